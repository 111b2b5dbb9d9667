-- Hands up to `count` jobs to a worker, each under a lease and a fence of its own. Sent again with the same
-- token, because an answer was lost, it hands out the same jobs.
-- ARGV: queue, worker, engine, count, held (how many it runs already), lease ms, token
-- Returns {ms until upkeep is due or -1, {id, fence, attempt, spec, created, expires, now, alone (1 | 0)}, …}
local worker, engine, count, held = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local lease, token = tonumber(ARGV[6]), ARGV[7]
-- A suspect that found no idle worker for this long makes a busy one take nothing else until it is idle.
local PATIENCE, WAIT_FOR_IDLE = 2000, 200
local last = P .. 'claimed:' .. worker

local function claim_of(id)
  local job = redis.call('HMGET', job_key(id), 'fence', 'attempt', 'spec', 'created', 'expires', 'worker', 'state',
    'crashes')
  if job[6] ~= worker or job[7] ~= 'running' then return nil end
  return { id, tonumber(job[1]), tonumber(job[2]), job[3], job[4], job[5], NOW, job[8] and 1 or 0 }
end

local function take(id)
  local key = job_key(id)
  local attempt, fence = redis.call('HINCRBY', key, 'attempt', 1), redis.call('INCR', P .. 'fence')
  redis.call('HSET', key, 'state', 'running', 'fence', fence, 'worker', worker, 'engine', engine, 'started', int(NOW))
  leave_queued(OWN, id, field(id, 'account'))
  enter_running(OWN, id, lease)
  redis.call('SET', 'arq:in-progress:' .. arq_id(id), worker, 'PX', int(lease))
  emit(id, 'running', cjson.encode({ attempt = attempt, worker = worker }))
end

local function take_ready(ids)
  while #ids < count do
    local id = next_ready(OWN)
    if not id then break end
    if NOW >= tonumber(field(id, 'expires')) then
      expire(id, 'could start')
    else
      take(id)
      ids[#ids + 1] = id
    end
  end
end

-- A job whose worker died gets a worker of its own; true when this one must take nothing beside it.
local function isolate(ids)
  local first = redis.call('ZRANGE', OWN.suspects, 0, 0, 'WITHSCORES')
  if not first[1] then return false end
  if held == 0 then
    redis.call('ZREM', OWN.suspects, first[1])
    redis.call('DEL', OWN.isolating)
    if exists(first[1]) then ids[1] = first[1] end
    return ids[1] ~= nil
  end
  if NOW - first[2] < PATIENCE then return false end
  redis.call('SET', OWN.isolating, worker, 'NX', 'PX', 10000)
  return redis.call('GET', OWN.isolating) == worker
end

local ids, pause = {}, nil
local known = redis.call('HMGET', last, 'token', 'ids')
if known[1] == token then
  ids = cjson.decode(known[2])
else
  sweep()
  if isolate(ids) then
    if ids[1] then take(ids[1]) else pause = WAIT_FOR_IDLE end
  else
    take_ready(ids)
  end
  if #ids > 0 then
    redis.call('HSET', last, 'token', token, 'ids', cjson.encode(ids))
    redis.call('PEXPIRE', last, int(lease))
  end
end

local claims = {}
for _, id in ipairs(ids) do claims[#claims + 1] = claim_of(id) end
return { pause or next_due(), unpack(claims) }
