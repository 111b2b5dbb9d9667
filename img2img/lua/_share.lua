-- Who is next: start-time fair queueing between tenants (Goyal, Vin, Cheng 1996), by estimated seconds of work.
-- `tenants` holds the tenants with ready jobs by their tag, the virtual time at which each is next; a job started moves
-- its tenant's tag on by its seconds over the tenant's weight. A tenant without ready jobs keeps a tag that lies ahead
-- of the queue's clock in `rested`, so that leaving and coming back gains nothing.
-- What waits is summed up in units (steps times relative area, in thousandths), which stay true when estimates change.

-- Seconds of virtual time between two tenants that come at once.
local ENTRY_STEP = 1e-6

-- The tag with which a tenant that has no ready job would come back.
local function entry_tag(queue, account, clock)
  return math.max(clock or 0, tonumber(redis.call('ZSCORE', queue.rested, account) or 0))
end

local function enter_ready(queue, id, job)
  if redis.call('ZADD', ready_of(queue, job.account), job.score, id) == 0 then return end
  redis.call('HINCRBY', tenant_of(queue, job.account), 'units', job.units)
  redis.call('HINCRBY', queue.totals, 'units', job.units)
  if not redis.call('ZSCORE', queue.tenants, job.account) then
    local totals = redis.call('HMGET', queue.totals, 'clock', 'entry')
    -- Those who come at the same virtual time keep the order in which they came.
    local entry = math.max(tonumber(totals[1] or 0), tonumber(totals[2] or 0)) + ENTRY_STEP
    redis.call('HSET', queue.totals, 'entry', exact(entry))
    redis.call('ZADD', queue.tenants, exact(entry_tag(queue, job.account, entry)), job.account)
    redis.call('ZREM', queue.rested, job.account)
  end
end

-- Its sums go with a tenant's last ready job, so that no error outlives it.
local function rest(queue, account)
  local tag = redis.call('ZSCORE', queue.tenants, account)
  redis.call('ZREM', queue.tenants, account)
  redis.call('HDEL', tenant_of(queue, account), 'units')
  if tag and tonumber(tag) > number_of(queue.totals, 'clock') then
    redis.call('ZADD', queue.rested, tag, account)
  end
  if redis.call('EXISTS', queue.tenants) == 0 then redis.call('HDEL', queue.totals, 'units') end
end

-- Call it after the job's member has been taken out of `ready`.
local function left_ready(queue, account, units)
  redis.call('HINCRBY', queue.totals, 'units', -units)
  redis.call('HINCRBY', tenant_of(queue, account), 'units', -units)
  if redis.call('EXISTS', ready_of(queue, account)) == 0 then rest(queue, account) end
end

-- How many jobs of the queue and of a tenant have not started, whatever they wait for.
local function enter_queued(queue, id, job)
  redis.call('ZADD', queue.expiry, job.expires, id)
  local tenant = tenant_of(queue, job.account)
  redis.call('HINCRBY', tenant, 'queued', 1)
  redis.call('HSET', tenant, 'weight', job.weight)
end

local function leave_queued(queue, id, account)
  redis.call('ZREM', queue.movable, id)
  redis.call('ZREM', queue.startable, id)
  if redis.call('ZREM', queue.expiry, id) == 0 then return end
  if redis.call('HINCRBY', tenant_of(queue, account), 'queued', -1) <= 0 then
    redis.call('DEL', tenant_of(queue, account))
  end
end

-- Takes the next ready job out, at its tenant's expense: its id and what is known of it; nil when there is none.
local function next_ready(queue, engine)
  while true do
    local first = redis.call('ZRANGE', queue.tenants, 0, 0, 'WITHSCORES')
    local account = first[1]
    if not account then return nil end
    local id = redis.call('ZPOPMIN', ready_of(queue, account))[1]
    local v = id and redis.call('HMGET', job_key(id), 'units', 'weight', 'size', 'steps', 'area', 'expires', 'attempt',
      'spec', 'created', 'failures', 'checkpoint', 'pools')
    if not id then
      rest(queue, account)
    elseif not v[1] then  -- its record has gone: see `exists`
      leave_queued(queue, id, account)
      left_ready(queue, account, 0)
    else
      local seconds = service_seconds(measures_of(queue, engine, v[3]), tonumber(v[4]), tonumber(v[5]))
      redis.call('HSET', queue.totals, 'clock', first[2])
      redis.call('ZREMRANGEBYSCORE', queue.rested, '-inf', first[2])
      redis.call('ZINCRBY', queue.tenants, exact(seconds / tonumber(v[2])), account)
      left_ready(queue, account, v[1])
      return id, { account = account, ms = int(1000 * seconds), expires = v[6], attempt = v[7], spec = v[8], created = v[9],
        failures = v[10], checkpoint = v[11], pools = v[12] }
    end
  end
end

-- What runs is summed up in expected milliseconds (`ms`) and times of start.
local function enter_running(queue, id, lease, ms)
  redis.call('ZADD', queue.leases, int(NOW + lease), id)
  redis.call('HINCRBY', queue.totals, 'running_ms', ms)
  redis.call('HINCRBY', queue.totals, 'running_since', int(NOW))
end

local function leave_running(queue, id, ms, started)
  if redis.call('ZREM', queue.leases, id) == 0 then return end
  if redis.call('EXISTS', queue.leases) == 0 then
    redis.call('HDEL', queue.totals, 'running_ms', 'running_since')
  elseif ms and started then
    redis.call('HINCRBY', queue.totals, 'running_ms', -ms)
    redis.call('HINCRBY', queue.totals, 'running_since', -started)
  end
end
