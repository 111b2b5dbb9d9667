-- Bounded upkeep on behalf of everybody; each caller does a little, so nothing depends on one process.

-- When nobody could call for longer than this, the server was away (stopped, restarted, its clock set), not the workers.
local STALL = 3000
-- Leases that ran out meanwhile are left to their workers for this long, to say that they live.
local STALL_GRACE = 5000

-- Members of an index whose time has come, `limit` at most.
local function due(index, limit, until_)
  return redis.call('ZRANGEBYSCORE', index, '-inf', int(until_ or NOW), 'LIMIT', 0, limit)
end

-- Up to when what was not renewed counts as given up.
local function given_up_until()
  local stall = redis.call('HMGET', OWN.stall, 'last', 'from', 'to', 'doubled')
  local last, from, to = tonumber(stall[1] or NOW), tonumber(stall[2] or 0), tonumber(stall[3] or 0)
  redis.call('HSET', OWN.stall, 'last', int(NOW))
  if NOW - last > STALL then
    -- A second gap before workers had their time after the first goes on with it; a third does not, since somebody may
    -- just call so seldom.
    local doubled = last < to + STALL_GRACE and stall[4] ~= '1'
    from, to = doubled and from or last, NOW
    redis.call('HSET', OWN.stall, 'from', int(from), 'to', int(to), 'doubled', doubled and '1' or '0')
  end
  return NOW < to + STALL_GRACE and from or NOW
end

local function set_slots(worker, slots)
  local before = tonumber(redis.call('HGET', OWN.slots, worker) or 0)
  slots = tonumber(slots)
  if slots == before then return end
  local all = redis.call('HINCRBY', OWN.totals, 'slots', slots - before)
  if all > 0 then
    redis.call('HDEL', OWN.totals, 'unserved')
  elseif redis.call('EXISTS', OWN.expiry) == 1 then
    redis.call('HSETNX', OWN.totals, 'unserved', int(NOW))
  end
  if slots > 0 then redis.call('HSET', OWN.slots, worker, slots) else redis.call('HDEL', OWN.slots, worker) end
end

local function forget_worker(worker)
  set_slots(worker, 0)
  redis.call('ZREM', OWN.workers, worker)
  redis.call('HDEL', OWN['worker-info'], worker)
end

local function sweep()
  local until_ = given_up_until()
  for _, id in ipairs(due(OWN.leases, 20, until_)) do
    if exists(id) then
      retry_or_end(id, 'crashes', 0, 'worker_lost', 'The worker died or lost its connection in mid-job')
    end
  end
  for _, id in ipairs(due(OWN.delayed, 100)) do
    if exists(id) then
      redis.call('ZREM', OWN.delayed, id)
      make_ready(OWN, id, (placing_of(id)))
    end
  end
  for _, id in ipairs(due(OWN.expiry, 50)) do
    if exists(id) then expire(id, 'could start') end
  end
  for _, id in ipairs(due(OWN.abandon, 50, until_)) do
    redis.call('ZREM', OWN.abandon, id)
    if exists(id) then request_stop(id, 'disconnect') end
  end
  for _, id in ipairs(due(OWN.quarantine, 20, NOW - 1000)) do
    if redis.call('EXISTS', job_key(id)) == 0 then redis.call('ZREM', OWN.quarantine, id) else break end
  end
  for _, worker in ipairs(due(OWN.workers, 20)) do forget_worker(worker) end
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
