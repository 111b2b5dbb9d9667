-- Hands up to `count` jobs to a worker, each under a lease and a fence of its own.
-- ARGV: queue, worker, count, lease ms
-- Returns {ms until upkeep is due or -1, {id, fence, attempt, spec, created, expires, now}, …}
local worker, count, lease = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
sweep()
local claims = {}
while #claims < count do
  local id = redis.call('ZPOPMIN', READY)[1]
  if not id then break end
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'expires', 'spec', 'created')
  if NOW >= tonumber(job[1]) then
    finalize(id, 'expired', error_outcome('expired', 'expired', 'The deadline passed before the job could start'))
  else
    local fence = redis.call('INCR', P .. 'fence')
    local attempt = redis.call('HINCRBY', key, 'attempt', 1)
    redis.call('HSET', key, 'state', 'running', 'fence', fence, 'worker', worker, 'started', int(NOW))
    redis.call('ZREM', EXPIRY, id)
    redis.call('ZADD', LEASES, int(NOW + lease), id)
    redis.call('SET', 'arq:in-progress:' .. arq_id(id), worker, 'PX', int(lease))
    emit(id, 'running', cjson.encode({ attempt = attempt, worker = worker }))
    claims[#claims + 1] = { id, fence, attempt, job[2], job[3], job[1], NOW }
  end
end
return { next_due(), unpack(claims) }
