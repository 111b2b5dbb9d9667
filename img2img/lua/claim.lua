-- Hands up to `count` jobs to a worker, each under a lease and a fence of its own. Sent again with the same
-- token, because an answer was lost, it hands out the same jobs.
-- ARGV: queue, worker, engine, count, held (how many it runs already), lease ms, token
-- Returns {ms until upkeep is due or -1 (or there are jobs), {id, fence, attempt, spec, created, expires, now, alone (1 | 0), failures}, …}
local worker, engine, count, held = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local lease, token = ARGV[6], ARGV[7]
-- A suspect that found no idle worker for this long makes a busy one take nothing else until it is idle.
local PATIENCE, WAIT_FOR_IDLE = 2000, 200
-- A worker that has its hands full leaves upkeep to others if it was done this short a time ago.
local SWEEP_EVERY = 20
local last = P .. 'claimed:' .. worker

-- What is answered again for a job that this worker still holds.
local function claim_of(id)
  local v = redis.call('HMGET', job_key(id), 'fence', 'attempt', 'spec', 'created', 'expires', 'crashes', 'worker', 'state',
    'failures')
  if v[7] ~= worker or v[8] ~= 'running' then return nil end
  return { id, tonumber(v[1]), tonumber(v[2]), v[3], v[4], v[5], NOW, v[6] and 1 or 0, v[9] or '0' }
end

local function take(id, job, alone)
  local attempt, fence = tonumber(job.attempt) + 1, redis.call('INCR', P .. 'fence')
  redis.call('HSET', job_key(id), 'state', 'running', 'attempt', attempt, 'fence', fence, 'worker', worker,
    'engine', engine, 'started', int(NOW), 'ms', job.ms)
  leave_queued(OWN, id, job.account)
  enter_running(OWN, id, lease, job.ms)
  redis.call('SET', 'arq:in-progress:' .. arq_id(id), worker, 'PX', lease)
  emit(id, 'running', '{"attempt":' .. attempt .. ',"worker":' .. cjson.encode(worker) .. '}')
  return { id, fence, attempt, job.spec, job.created, job.expires, NOW, alone, job.failures or '0' }
end

local function take_ready(claims)
  while #claims < count do
    local id, job = next_ready(OWN, engine)
    if not id then break end
    if NOW >= tonumber(job.expires) then
      expire(id, 'could start')
    else
      claims[#claims + 1] = take(id, job, 0)
    end
  end
end

local function take_alone(id)
  local v = redis.call('HMGET', job_key(id), 'account', 'ms', 'expires', 'attempt', 'spec', 'created', 'failures')
  return take(id, { account = v[1], ms = v[2], expires = v[3], attempt = v[4], spec = v[5], created = v[6],
    failures = v[7] }, 1)
end

-- A job whose worker died gets a worker of its own; true when this one must take nothing beside it.
local function isolate(claims)
  local first = redis.call('ZRANGE', OWN.suspects, 0, 0, 'WITHSCORES')
  if not first[1] then return false end
  if held == 0 then
    redis.call('ZREM', OWN.suspects, first[1])
    redis.call('DEL', OWN.isolating)
    if exists(first[1]) then claims[1] = take_alone(first[1]) end
    return claims[1] ~= nil
  end
  if NOW - first[2] < PATIENCE then return false end
  redis.call('SET', OWN.isolating, worker, 'NX', 'PX', 10000)
  return redis.call('GET', OWN.isolating) == worker
end

local function answer_again(ids)
  local claims = {}
  for id in string.gmatch(ids, '%S+') do claims[#claims + 1] = claim_of(id) end
  return { next_due(), unpack(claims) }
end

local known_token, known_ids = string.match(redis.call('GET', last) or '', '^(%S+) (.*)$')
if known_token == token then return answer_again(known_ids) end

if redis.call('EXISTS', OWN.tenants) == 0 or NOW - (redis.call('HGET', OWN.stall, 'last') or 0) >= SWEEP_EVERY then
  sweep()
end
local claims = {}
if isolate(claims) then
  if not claims[1] then return { WAIT_FOR_IDLE } end
else
  take_ready(claims)
end
if #claims == 0 then
  -- Nothing is ready, so that whatever tokens there are belong to jobs that others took.
  redis.call('DEL', OWN.wake)
  return { next_due() }
end
local ids = {}
for i, claim in ipairs(claims) do ids[i] = claim[1] end
redis.call('SET', last, token .. ' ' .. table.concat(ids, ' '), 'PX', lease)
return { -1, unpack(claims) }
