-- Hands up to `count` jobs to a worker, each under a lease and a fence of its own. Sent again with the same
-- token, because an answer was lost, it hands out the same jobs.
-- ARGV: queue, worker, count, lease ms, token
-- Returns {ms until upkeep is due or -1, {id, fence, attempt, spec, created, expires, now}, …}
local worker, count, lease, token = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local last = P .. 'claimed:' .. worker

local function claim_of(id)
  local job = redis.call('HMGET', job_key(id), 'fence', 'attempt', 'spec', 'created', 'expires', 'worker', 'state')
  if job[6] ~= worker or job[7] ~= 'running' then return nil end
  return { id, tonumber(job[1]), tonumber(job[2]), job[3], job[4], job[5], NOW }
end

local function take(id)
  local key = job_key(id)
  redis.call('HINCRBY', key, 'attempt', 1)
  local fence = redis.call('INCR', P .. 'fence')
  redis.call('HSET', key, 'state', 'running', 'fence', fence, 'worker', worker, 'started', int(NOW))
  redis.call('ZREM', OWN.expiry, id)
  redis.call('ZADD', OWN.leases, int(NOW + lease), id)
  redis.call('SET', 'arq:in-progress:' .. arq_id(id), worker, 'PX', int(lease))
  emit(id, 'running', cjson.encode({ attempt = tonumber(field(id, 'attempt')), worker = worker }))
end

local ids = {}
local known = redis.call('HMGET', last, 'token', 'ids')
if known[1] == token then
  ids = cjson.decode(known[2])
else
  sweep()
  while #ids < count do
    local id = redis.call('ZPOPMIN', OWN.ready)[1]
    if not id then break end
    if exists(id) and field(id, 'state') == 'queued' then
      if NOW >= tonumber(field(id, 'expires')) then
        finalize(id, 'expired', error_outcome('expired', 'expired', 'The deadline passed before the job could start'))
      else
        take(id)
        ids[#ids + 1] = id
      end
    end
  end
  if #ids > 0 then
    redis.call('HSET', last, 'token', token, 'ids', cjson.encode(ids))
    redis.call('PEXPIRE', last, int(lease))
  end
end

local claims = {}
for _, id in ipairs(ids) do claims[#claims + 1] = claim_of(id) end
return { next_due(), unpack(claims) }
