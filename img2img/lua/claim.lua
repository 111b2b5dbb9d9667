-- Hands up to `count` jobs to a worker, each under a lease and a fence of its own. Sent again with the same
-- token, because an answer was lost, it hands out the same jobs.
-- ARGV: queue, worker, engine, count, held (how many it runs already), suspects (how many of those are), lease ms, token
-- Returns {ms until upkeep is due or -1 (or there are jobs),
--   {id, fence, attempt, spec, created, expires, now, suspect (1 | 0), failures, checkpoint (JSON) or nil,
--    whether it may go to other pools (1 | 0)}, …}
local worker, engine, count, held, suspects = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local lease, token = ARGV[7], ARGV[8]
-- A suspect that found no idle worker for this long goes beside other jobs, but never beside another suspect.
local PATIENCE = 1000
-- A worker that has its hands full leaves upkeep to others if it was done this short a time ago.
local SWEEP_EVERY = 20
-- Longer than a server may be away: until then a worker asks again with its token.
local ANSWER_KEPT = 60000
local last = P .. 'claimed:' .. worker

-- Whether the list in a job's record has more than one pool.
local function has_others(pools) return pools and string.find(pools, '},{', 1, true) and 1 or 0 end

-- What is answered again for a job that this worker still holds.
local function claim_of(id)
  local v = redis.call('HMGET', job_key(id), 'fence', 'attempt', 'spec', 'created', 'expires', 'crashes', 'worker', 'state',
    'failures', 'checkpoint', 'pools')
  if v[7] ~= worker or v[8] ~= 'running' then return nil end
  redis.call('ZADD', OWN.leases, 'XX', int(NOW + lease), id)
  redis.call('PEXPIRE', 'arq:in-progress:' .. arq_id(id), lease)
  return { id, tonumber(v[1]), tonumber(v[2]), v[3], v[4], v[5], NOW, v[6] and 1 or 0, v[9] or '0', v[10], has_others(v[11]) }
end

-- Never again the same, even after a failover to a server that has not seen the latest ones: they follow the clock.
local function next_fence()
  local fence = int(math.max(tonumber(redis.call('GET', P .. 'fence') or 0) + 1, TIME[1] * 1000000 + TIME[2]))
  redis.call('SET', P .. 'fence', fence)
  return tonumber(fence)
end

local function take(id, job, suspect)
  local attempt, fence = tonumber(job.attempt) + 1, next_fence()
  redis.call('HSET', job_key(id), 'state', 'running', 'attempt', attempt, 'fence', int(fence), 'worker', worker,
    'engine', engine, 'started', int(NOW), 'ms', job.ms)
  if job.checkpoint then redis.call('HSET', job_key(id), 'resumed', 1) end
  leave_queued(OWN, id, job.account)
  enter_running(OWN, id, lease, job.ms)
  redis.call('SET', 'arq:in-progress:' .. arq_id(id), worker, 'PX', lease)
  emit(id, 'running', '{"attempt":' .. attempt .. ',"worker":' .. cjson.encode(worker) .. '}')
  return { id, fence, attempt, job.spec, job.created, job.expires, NOW, suspect, job.failures or '0', job.checkpoint,
    has_others(job.pools) }
end

local MAX_EXPIRED = 50

-- Returns whether it stopped before the queue was empty, because so many had expired.
local function take_ready(claims)
  local expired = 0
  while #claims < count and expired < MAX_EXPIRED do
    local id, job = next_ready(OWN, engine)
    if not id then break end
    if NOW >= tonumber(job.expires) then
      expire(id, 'could start')
      expired = expired + 1
    else
      claims[#claims + 1] = take(id, job, 0)
    end
  end
  return expired >= MAX_EXPIRED
end

local function take_suspect(id)
  local v = redis.call('HMGET', job_key(id), 'account', 'ms', 'expires', 'attempt', 'spec', 'created', 'failures',
    'checkpoint', 'pools')
  return take(id, { account = v[1], ms = v[2], expires = v[3], attempt = v[4], spec = v[5], created = v[6],
    failures = v[7], checkpoint = v[8], pools = v[9] }, 1)
end

-- A job whose worker died runs alone on an idle worker, if there is one soon. True when nothing may run beside it.
local function isolate(claims)
  local first = redis.call('ZRANGE', OWN.suspects, 0, 0, 'WITHSCORES')
  if not first[1] or suspects > 0 or (held > 0 and NOW - first[2] < PATIENCE) then return false end
  redis.call('ZREM', OWN.suspects, first[1])
  if exists(first[1]) then claims[1] = take_suspect(first[1]) end
  return claims[1] ~= nil and held == 0
end

-- When this worker should look again although nobody rings.
local function look_again()
  local soonest, first = next_due(), redis.call('ZRANGE', OWN.suspects, 0, 0, 'WITHSCORES')
  if not first[2] or suspects > 0 then return soonest end
  local ripe = math.max(0, first[2] + PATIENCE - NOW)
  return (soonest < 0 or ripe < soonest) and ripe or soonest
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
local more = not isolate(claims) and take_ready(claims)
if #claims == 0 and more then return { 0 } end
if #claims == 0 then
  -- Nothing is ready, so that whatever tokens there are belong to jobs that others took.
  if redis.call('EXISTS', OWN.suspects) == 0 then redis.call('DEL', OWN.wake) end
  return { look_again() }
end
local ids = {}
for i, claim in ipairs(claims) do ids[i] = claim[1] end
redis.call('SET', last, token .. ' ' .. table.concat(ids, ' '), 'PX', ANSWER_KEPT)
return { -1, unpack(claims) }
