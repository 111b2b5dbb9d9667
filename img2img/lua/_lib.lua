-- What every script shares; put in front of each when it is loaded. Keys: docs/queue.md.
-- KEYS[1] is the shard's prefix "img2img:{<shard>}:", ARGV[1] the queue's name. Every key lies in that slot.
-- Only the server's clock counts: TIME is read here, never sent by a client.

local P, QUEUE = KEYS[1], ARGV[1]
local SHARD = string.match(P, '{.-}')
local DISCARD = P .. 'discard'
local WAKE_CAP = 512
-- After a restart of the server old leases look expired: their workers get this many seconds to say that they live.
local RESTART_GRACE = 5

-- The indexes of a queue. A job's own queue counts, whichever queue a caller looks at.
local function indexes(queue)
  return {
    ready = P .. 'ready:' .. queue, delayed = P .. 'delayed:' .. queue, leases = P .. 'leases:' .. queue,
    expiry = P .. 'expiry:' .. queue, abandon = P .. 'abandon:' .. queue, wake = P .. 'wake:' .. queue,
    alive = 'arq:queue:' .. SHARD .. ':' .. queue,
  }
end

local OWN = indexes(QUEUE)
local WORKERS, WORKER_INFO = P .. 'workers:' .. QUEUE, P .. 'worker-info:' .. QUEUE

local TIME = redis.call('TIME')
local NOW = TIME[1] * 1000 + math.floor(TIME[2] / 1000)

local function int(number) return string.format('%.0f', number) end

local function job_key(id) return P .. 'job:' .. id end

-- arq's id of a job carries the hash tag, so that arq's own keys fall into the same slot.
local function arq_id(id) return (string.gsub(id, '^(%d+)', '{%1}')) end

local function field(id, name) return redis.call('HGET', job_key(id), name) end

local function emit(id, kind, data)
  local seq = redis.call('HINCRBY', job_key(id), 'seq', 1)
  redis.call('XADD', P .. 'events:' .. id, seq .. '-0', 'type', kind, 'at', int(NOW), 'data', data)
  redis.call('PUBLISH', P .. 'bell:' .. id, seq)
end

local function wake(queue)
  redis.call('RPUSH', queue.wake, '1')
  redis.call('LTRIM', queue.wake, -WAKE_CAP, -1)
end

local function queue_of(id) return indexes(field(id, 'queue') or QUEUE) end

local function unlist(id, queue)
  redis.call('ZREM', queue.alive, arq_id(id))
  for _, name in ipairs({ 'ready', 'delayed', 'leases', 'expiry', 'abandon' }) do
    redis.call('ZREM', queue[name], id)
  end
end

-- An index can outlive a record, when nobody swept for longer than the record is kept. Such a member goes.
local function exists(id)
  if redis.call('HEXISTS', job_key(id), 'spec') == 1 then return true end
  unlist(id, OWN)
  return false
end

local function error_outcome(state, code, message)
  return cjson.encode({ state = state, error = { code = code, message = message } })
end

-- The only way into a terminal state: record, terminal event, arq's result and every index in one go.
local function finalize(id, state, outcome)
  local key, arq = job_key(id), arq_id(id)
  local job = redis.call('HMGET', key, 'keep', 'attempt', 'created', 'started', 'inputs')
  local keep, queue = tonumber(job[1]), queue_of(id)
  redis.call('HSET', key, 'state', state, 'finished', int(NOW), 'outcome', outcome)
  local result = cjson.encode({
    t = tonumber(job[2]), f = 'generate', a = { id }, k = {}, et = tonumber(job[3]),
    s = state == 'succeeded', r = outcome, st = tonumber(job[4] or NOW), ft = NOW, q = queue.alive, id = arq,
  })
  redis.call('SET', 'arq:result:' .. arq, result, 'PX', int(keep))
  redis.call('DEL', 'arq:job:' .. arq, 'arq:in-progress:' .. arq, 'arq:retry:' .. arq, P .. 'waiters:' .. id)
  unlist(id, queue)
  emit(id, state, outcome)
  redis.call('PEXPIRE', key, int(keep))
  redis.call('PEXPIRE', P .. 'events:' .. id, int(keep))
  if job[5] then redis.call('RPUSH', DISCARD, job[5]) end
end

-- Back into the queue, at its old place; `delay` in milliseconds.
local function requeue(id, delay, data)
  local key, queue = job_key(id), queue_of(id)
  redis.call('HSET', key, 'state', 'queued')
  redis.call('HDEL', key, 'worker', 'running', 'fence')
  redis.call('ZREM', queue.leases, id)
  redis.call('DEL', 'arq:in-progress:' .. arq_id(id))
  redis.call('ZADD', queue.expiry, field(id, 'expires'), id)
  if delay > 0 then
    redis.call('ZADD', queue.delayed, int(NOW + delay), id)
  else
    redis.call('ZADD', queue.ready, field(id, 'score'), id)
  end
  emit(id, 'queued', data)
  wake(queue)
end

-- A failed or crashed attempt: another one, unless all are spent, it was told to stop, or its time is over.
local function retry_or_end(id, delay, code, message)
  local job = redis.call('HMGET', job_key(id), 'stop', 'expires', 'attempts')
  local spent = redis.call('HINCRBY', job_key(id), 'spent', 1)
  redis.call('HDEL', job_key(id), 'fence')
  if job[1] then
    finalize(id, 'canceled', error_outcome('canceled', 'canceled', 'Canceled: ' .. job[1]))
  elseif NOW >= tonumber(job[2]) then
    finalize(id, 'expired', error_outcome('expired', 'expired', 'The deadline passed before the job was done'))
  elseif spent >= tonumber(job[3]) then
    finalize(id, 'failed', error_outcome('failed', code, message))
  else
    requeue(id, delay, cjson.encode({ error = { code = code, message = message } }))
  end
end

local function request_stop(id, reason)
  local job = redis.call('HMGET', job_key(id), 'state', 'worker')
  if job[1] == 'queued' then
    redis.call('HSET', job_key(id), 'stop', reason)
    finalize(id, 'canceled', error_outcome('canceled', 'canceled', 'Canceled: ' .. reason))
    return 'canceled'
  elseif job[1] == 'running' then
    redis.call('HSETNX', job_key(id), 'stop', reason)
    redis.call('RPUSH', P .. 'control:' .. job[2], id .. ' ' .. reason)
    redis.call('PEXPIRE', P .. 'control:' .. job[2], 60000)
  end
  return job[1]
end

-- Members of an index whose time has come; `after` leaves out what was due before.
local function due(index, limit, after)
  return redis.call('ZRANGEBYSCORE', index, after or '-inf', int(NOW), 'LIMIT', 0, limit)
end

local function lost_leases()
  local lost = due(OWN.leases, 20)
  if #lost == 0 then return lost end
  local uptime = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)') or RESTART_GRACE)
  if uptime >= RESTART_GRACE then return lost end
  return due(OWN.leases, 20, int(NOW - 1000 * (uptime + 1)))
end

-- Bounded upkeep on behalf of everybody; each caller does a little, so nothing depends on one process.
local function sweep()
  for _, id in ipairs(lost_leases()) do
    if exists(id) then
      retry_or_end(id, 0, 'worker_lost', 'The worker died or lost its connection in mid-job')
    end
  end
  for _, id in ipairs(due(OWN.delayed, 100)) do
    if exists(id) then
      redis.call('ZREM', OWN.delayed, id)
      redis.call('ZADD', OWN.ready, field(id, 'score'), id)
      wake(OWN)
    end
  end
  for _, id in ipairs(due(OWN.expiry, 50)) do
    if exists(id) then
      finalize(id, 'expired', error_outcome('expired', 'expired', 'The deadline passed before the job could start'))
    end
  end
  for _, id in ipairs(due(OWN.abandon, 50)) do
    redis.call('ZREM', OWN.abandon, id)
    if exists(id) then request_stop(id, 'disconnect') end
  end
  for _, worker in ipairs(due(WORKERS, 20)) do
    redis.call('ZREM', WORKERS, worker)
    redis.call('HDEL', WORKER_INFO, worker)
  end
end

-- Milliseconds until upkeep has something to do again, or -1.
local function next_due()
  local soonest = -1
  for _, name in ipairs({ 'delayed', 'leases', 'expiry', 'abandon' }) do
    local first = redis.call('ZRANGE', OWN[name], 0, 0, 'WITHSCORES')
    if first[2] then
      local wait = math.max(0, tonumber(first[2]) - NOW)
      if soonest < 0 or wait < soonest then soonest = wait end
    end
  end
  return soonest
end

-- Registers interest in a job that ends when nobody waits for it any more.
local function wait_for(id, waiter, ttl, grace)
  local waiters = P .. 'waiters:' .. id
  redis.call('ZADD', waiters, int(NOW + ttl), waiter)
  redis.call('PEXPIRE', waiters, int(ttl + grace + 60000))
  redis.call('ZADD', OWN.abandon, 'GT', int(NOW + ttl + grace), id)
end
