-- A job's transitions.

local HISTORY = 20

-- Takes a job that has not started out of every index.
local function leave_waiting(id, queue, account, units)
  redis.call('ZREM', queue.delayed, id)
  redis.call('ZREM', queue.suspects, id)
  if not account then
    redis.call('ZREM', queue.expiry, id)
    redis.call('ZREM', queue.movable, id)
    redis.call('ZREM', queue.startable, id)
    return
  end
  leave_queued(queue, id, account)
  if redis.call('ZREM', ready_of(queue, account), id) == 1 then left_ready(queue, account, units) end
end

-- An index can outlive a record, when nobody swept for longer than the record is kept. Such a member goes.
local function exists(id)
  if redis.call('HEXISTS', job_key(id), 'spec') == 1 then return true end
  redis.call('ZREM', OWN.alive, arq_id(id))
  redis.call('ZREM', OWN.abandon, id)
  leave_running(OWN, id)
  leave_waiting(id, OWN)
  return false
end

local function arq_payload(id) return '{"t":null,"f":"generate","a":["' .. id .. '"],"k":{},"et":' .. int(NOW) .. '}' end

local function failure(code, message) return { code = code, message = message } end

local function error_outcome(state, code, message)
  return cjson.encode({ state = state, error = failure(code, message) })
end

-- Notes how an attempt ended that brought no result: `kind` is its counter, failures | crashes | interruptions.
local function note_attempt(id, kind, code, message)
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'history', 'attempt', 'worker', 'started')
  local history = job[1] and cjson.decode(job[1]) or {}
  history[#history + 1] = {
    attempt = tonumber(job[2]), worker = job[3], started_at = tonumber(job[4]), ended_at = NOW,
    error = failure(code, message),
  }
  if #history > HISTORY then table.remove(history, 1) end
  redis.call('HSET', key, 'history', cjson.encode(history))
  return redis.call('HINCRBY', key, kind, 1)
end

-- Tells upkeep that a job's blob is not needed any more, or (its input, for a replay) only within `kept` milliseconds.
local function discard(blob, kept)
  if blob then redis.call('RPUSH', DISCARD, int(kept) .. ' ' .. blob) end
end

-- Forgets where an attempt could go on; `checkpoint` is what the record says of it, if anything.
local function drop_checkpoint(id, checkpoint)
  if not checkpoint then return end
  discard(cjson.decode(checkpoint).blob, 0)
  redis.call('HDEL', job_key(id), 'checkpoint', 'checkpoint_fence', 'resumed')
end

-- Takes the picture out of a job's latest preview: puts the event without it, as the record remembers it, in its place.
local function strip_preview(id, remembered)
  if not remembered then return end
  local number, bare = string.match(remembered, '^(%d+) (.*)$')
  redis.call('LSET', P .. 'events:' .. id, number - 1, bare)
  redis.call('HDEL', job_key(id), 'preview')
end

-- Takes that word back; false when somebody is following it already, so that the input may go at any moment.
local function keep_inputs(id)
  local job = redis.call('HMGET', job_key(id), 'inputs', 'keep')
  if not job[1] then return true end
  if redis.call('ZSCORE', DISCARDING, '0 ' .. job[1]) then return false end
  for _, kept in ipairs({ '0', job[2] }) do redis.call('LREM', DISCARD, 0, kept .. ' ' .. job[1]) end
  return true
end

-- The only way into a terminal state: record, terminal event, arq's result and every index in one go.
local function finalize(id, state, outcome)
  local key, arq = job_key(id), arq_id(id)
  local job = redis.call('HMGET', key, 'keep', 'attempt', 'created', 'started', 'inputs', 'quarantined', 'queue', 'state',
    'ms', 'account', 'units', 'checkpoint', 'preview', 'sent', 'reserved')
  local keep, queue = job[1], queue_named(job[7])
  redis.call('HSET', key, 'state', state, 'finished', int(NOW), 'outcome', outcome)
  if state == 'succeeded' then learn(queue, id) end
  local result = cjson.encode({
    t = tonumber(job[2]), f = 'generate', a = { id }, k = {}, et = tonumber(job[3]),
    s = state == 'succeeded', r = outcome, st = tonumber(job[4] or NOW), ft = NOW, q = queue.alive, id = arq,
  })
  redis.call('SET', 'arq:result:' .. arq, result, 'PX', keep)
  redis.call('DEL', 'arq:job:' .. arq, 'arq:in-progress:' .. arq, P .. 'waiters:' .. id)
  redis.call('ZREM', queue.alive, arq)
  redis.call('ZREM', queue.abandon, id)
  if job[8] == 'running' then
    leave_running(queue, id, job[9], job[4])
  else
    leave_waiting(id, queue, job[10], job[11])
  end
  strip_preview(id, job[13])
  emit(id, state, outcome)
  redis.call('PEXPIRE', key, keep)
  redis.call('PEXPIRE', P .. 'events:' .. id, keep)
  -- These wait for somebody who decides whether to replay them.
  local undecided = job[6] or (state == 'failed' and job[14] == 'fail')
  discard(job[5], undecided and keep or 0)
  -- An engine that makes no calls is paid for its picture.
  if state ~= 'succeeded' then refund(job[10], job[15]) end
  if job[15] then redis.call('HDEL', key, 'reserved') end
  drop_checkpoint(id, job[12])
end

local function expire(id, doing)
  if doing == 'could start' and (tonumber(field(id, 'attempt')) or 0) > 0 then doing = doing .. ' again' end
  finalize(id, 'expired', error_outcome('expired', 'expired', 'The deadline passed before the job ' .. doing))
end

local function cancel(id, reason)
  finalize(id, 'canceled', error_outcome('canceled', 'canceled', 'Canceled: ' .. reason))
end

-- So many workers are woken for a suspect, since those that are busy leave it to an idle one.
local SUSPECT_TOKENS = 8

-- Ready for a worker. A job whose worker died is a suspect and runs alone next time, if possible, so that only the
-- culprit is found guilty twice.
local function make_ready(queue, id, job)
  redis.call('ZADD', queue.startable, int(NOW), id)
  if job.crashes then
    redis.call('ZADD', queue.suspects, int(NOW), id)
    for _ = 1, SUSPECT_TOKENS do wake(queue) end
  else
    enter_ready(queue, id, job)
    wake(queue)
  end
end

-- What it takes to put a job of that record into a queue.
local function placing_of(id)
  local v = redis.call('HMGET', job_key(id), 'account', 'score', 'units', 'expires', 'weight', 'crashes', 'queue', 'pools')
  return { account = v[1], score = v[2], units = v[3], expires = v[4], weight = v[5], crashes = v[6], pools = v[8] },
    queue_named(v[7])
end

-- When a job that may go elsewhere is first looked at again, unless somebody knows better (`job.look`).
local FIRST_LOOK = 1000

-- Into the queue: ready at `due`, or at once when that has passed.
local function enqueue(queue, id, job, due, data)
  enter_queued(queue, id, job)
  redis.call('SADD', QUEUES, queue.name)
  if job.pools then
    redis.call('ZADD', queue.movable, int(job.look or NOW + FIRST_LOOK), id)
    -- From now on somebody waits for a first worker.
    if due <= NOW and number_of(queue.totals, 'slots') <= 0 then
      redis.call('HSETNX', queue.totals, 'unserved', int(NOW))
    end
  end
  if due > NOW then
    redis.call('ZADD', queue.delayed, int(due), id)
    wake(queue)
  else
    make_ready(queue, id, job)
  end
  emit(id, 'queued', data)
end

-- Back into the queue, at its old place; `delay` in milliseconds.
local function requeue(id, delay, code, message)
  local key, job, queue = job_key(id), placing_of(id)
  local running = redis.call('HMGET', key, 'ms', 'started', 'preview')
  leave_running(queue, id, running[1], running[2])
  strip_preview(id, running[3])
  redis.call('HDEL', key, 'worker', 'running', 'fence', 'sent', 'call', 'charged')
  redis.call('HSET', key, 'state', 'queued')
  redis.call('HINCRBY', key, 'ran', int(NOW - running[2]))
  redis.call('DEL', 'arq:in-progress:' .. arq_id(id))
  enqueue(queue, id, job, NOW + delay, cjson.encode({ error = failure(code, message) }))
end

-- Whether the next attempt may go on from the checkpoint that one of `fence` left or found. Not after a failure, nor
-- when the worker died of an attempt that had begun with it and got to no other: it may be what they died of.
local function is_good(checkpoint_fence, fence, kind)
  return kind == 'interruptions' or (kind == 'crashes' and checkpoint_fence == fence)
end

local MAY_BE_BILLED = 'A call upstream was sent and its answer lost, so that it may have been billed'

-- A claimed job whose attempt brought no result: again, unless it was told to stop, its time or its attempts are up, or
-- it had sent a call that must not be billed twice.
local function retry_or_end(id, kind, delay, code, message)
  local sent = field(id, 'sent')
  if sent then message = message .. '. ' .. MAY_BE_BILLED end
  local key, count = job_key(id), note_attempt(id, kind, code, message)
  local job = redis.call('HMGET', key, 'stop', 'expires', 'max_' .. kind, 'queue', 'fence', 'checkpoint',
    'checkpoint_fence')
  redis.call('HDEL', key, 'fence')
  local limit = tonumber(job[3] or nil)
  if not is_good(job[7], job[5], kind) then drop_checkpoint(id, job[6]) end
  if job[1] then
    cancel(id, job[1])
  elseif NOW >= tonumber(job[2]) then
    expire(id, 'was done')
  elseif sent == 'fail' then
    finalize(id, 'failed', error_outcome('failed', 'upstream_unknown', MAY_BE_BILLED .. ': replay the job to run it again'))
  elseif not limit or count < limit then
    requeue(id, delay, code, message)
  elseif kind == 'crashes' then
    redis.call('HSET', key, 'quarantined', 1)
    redis.call('ZADD', queue_named(job[4]).quarantine, int(NOW), id)
    local why = 'Its worker died ' .. count .. ' times while running it: replay it when the cause is mended'
    finalize(id, 'failed', error_outcome('failed', 'quarantined', why))
  else
    finalize(id, 'failed', error_outcome('failed', code, message))
  end
end

local function request_stop(id, reason)
  local job = redis.call('HMGET', job_key(id), 'state', 'worker')
  if job[1] == 'queued' then
    redis.call('HSET', job_key(id), 'stop', reason)
    cancel(id, reason)
    return 'canceled'
  elseif job[1] == 'running' then
    redis.call('HSETNX', job_key(id), 'stop', reason)
    -- No more than a nudge: which attempt is to stop, and why, the record tells the worker's next beat.
    redis.call('RPUSH', P .. 'control:' .. job[2], id .. ' ' .. reason)
    redis.call('PEXPIRE', P .. 'control:' .. job[2], 60000)
  end
  return job[1]
end

-- Registers interest in a job that ends when nobody waits for it any more.
local function wait_for(id, waiter, ttl, grace)
  local waiters, queue = P .. 'waiters:' .. id, queue_named(field(id, 'queue'))
  redis.call('ZADD', waiters, int(NOW + ttl), waiter)
  redis.call('PEXPIRE', waiters, int(ttl + grace + 60000))
  redis.call('ZADD', queue.abandon, 'GT', int(NOW + ttl + grace), id)
end
