-- Who is next: start-time fair queueing between tenants (Goyal, Vin, Cheng 1996), by estimated seconds of work.
-- `tenants` holds the tenants with ready jobs by their tag, the virtual time at which each is next; a job started moves
-- its tenant's tag on by its seconds over the tenant's weight. A tenant without ready jobs keeps a tag that lies ahead
-- of the queue's clock in `rested`, so that leaving and coming back gains nothing.
-- What waits is summed up in units (steps times relative area), which stay true when the estimates change.

-- The tag with which a tenant that has no ready job would come back.
local function entry_tag(queue, account)
  return math.max(number_of(queue.totals, 'clock'), tonumber(redis.call('ZSCORE', queue.rested, account) or 0))
end

local function enter_ready(queue, id)
  local job = redis.call('HMGET', job_key(id), 'account', 'score', 'units')
  local account, units = job[1], tonumber(job[3])
  redis.call('ZADD', queue.ready .. account, job[2], id)
  add_to(queue.tenant .. account, 'units', units)
  redis.call('HINCRBY', queue.totals, 'ready', 1)
  add_to(queue.totals, 'units', units)
  if not redis.call('ZSCORE', queue.tenants, account) then
    redis.call('ZADD', queue.tenants, decimal(entry_tag(queue, account)), account)
    redis.call('ZREM', queue.rested, account)
  end
end

-- Its sums go with a tenant's last ready job, so that no rounding error outlives it.
local function rest(queue, account)
  local tag = redis.call('ZSCORE', queue.tenants, account)
  redis.call('ZREM', queue.tenants, account)
  redis.call('HDEL', queue.tenant .. account, 'units')
  if tag and tonumber(tag) > number_of(queue.totals, 'clock') then
    redis.call('ZADD', queue.rested, tag, account)
  end
  if redis.call('EXISTS', queue.tenants) == 0 then redis.call('HDEL', queue.totals, 'ready', 'units') end
end

-- Call it after the job's member has been taken out of `ready`.
local function left_ready(queue, account, units)
  redis.call('HINCRBY', queue.totals, 'ready', -1)
  add_to(queue.totals, 'units', -units)
  add_to(queue.tenant .. account, 'units', -units)
  if redis.call('EXISTS', queue.ready .. account) == 0 then rest(queue, account) end
end

-- How many jobs of the queue and of a tenant have not started, whatever they wait for.
local function enter_queued(queue, id, account)
  redis.call('ZADD', queue.expiry, field(id, 'expires'), id)
  redis.call('HINCRBY', queue.tenant .. account, 'queued', 1)
  redis.call('HSET', queue.tenant .. account, 'weight', field(id, 'weight'))
end

local function leave_queued(queue, id, account)
  if redis.call('ZREM', queue.expiry, id) == 0 then return end
  if redis.call('HINCRBY', queue.tenant .. account, 'queued', -1) <= 0 then
    redis.call('DEL', queue.tenant .. account)
  end
end

-- Takes the next ready job out, at its tenant's expense; nil when there is none.
local function next_ready(queue)
  while true do
    local first = redis.call('ZRANGE', queue.tenants, 0, 0, 'WITHSCORES')
    local account = first[1]
    if not account then return nil end
    local id = redis.call('ZPOPMIN', queue.ready .. account)[1]
    local job = id and redis.call('HMGET', job_key(id), 'units', 'weight', 'size', 'steps', 'area')
    if not id then
      rest(queue, account)
    elseif not job[1] then  -- its record has gone: see `exists`
      leave_queued(queue, id, account)
      left_ready(queue, account, 0)
    else
      redis.call('HSET', queue.totals, 'clock', first[2])
      redis.call('ZREMRANGEBYSCORE', queue.rested, '-inf', first[2])
      local seconds = service_seconds(queue, job[3], tonumber(job[4]), tonumber(job[5]))
      redis.call('ZINCRBY', queue.tenants, decimal(seconds / tonumber(job[2])), account)
      left_ready(queue, account, tonumber(job[1]))
      redis.call('HSET', job_key(id), 'seconds', decimal(seconds))
      return id
    end
  end
end

local function enter_running(queue, id, lease)
  redis.call('ZADD', queue.leases, int(NOW + lease), id)
  add_to(queue.totals, 'running_seconds', field(id, 'seconds') or 0)
  redis.call('HINCRBY', queue.totals, 'running_since', int(NOW))
end

local function leave_running(queue, id)
  if redis.call('ZREM', queue.leases, id) == 0 then return end
  if redis.call('EXISTS', queue.leases) == 0 then
    redis.call('HDEL', queue.totals, 'running_seconds', 'running_since')
    return
  end
  local job = redis.call('HMGET', job_key(id), 'seconds', 'started')
  if job[1] and job[2] then
    add_to(queue.totals, 'running_seconds', -job[1])
    redis.call('HINCRBY', queue.totals, 'running_since', -job[2])
  end
end
