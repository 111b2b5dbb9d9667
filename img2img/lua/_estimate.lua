-- When a job will be done. The expected time (the work before it over the workers' slots, and its own) is corrected by what
-- such expectations turned out to be worth: quantiles of actual over expected time, per bucket of waiting time, tracked
-- by stochastic approximation (Robbins and Monro 1951; Gibbs and Candes 2021 call it adaptive conformal inference).
-- Whatever the load, half of the jobs end before p50 and nine of ten before p90 in the long run; one of ten before p10.

local MAX_TENANTS_SEEN = 100
local NOTHING_SEEN = '0 -0.5 0 0.5'
local RATE, SLOWEST_RATE = 0.3, 0.03

-- Work that came in lately, in seconds a second: sums that decay with this time constant (ms).
local INFLOW_MEMORY = 30000
-- However much comes in, this share of the slots is left to whoever waits.
local LEAST_SHARE = 0.25

local function decayed(sum, at) return (sum or 0) * math.exp(((at or NOW) - NOW) / INFLOW_MEMORY) end

local function inflow_of(queue, account)
  local sum, at = string.match(redis.call('GET', queue.inflow .. ':' .. account) or '', '(%S+) (%S+)')
  return decayed(tonumber(sum), tonumber(at))
end

local function note_inflow(queue, totals, account, seconds)
  local mine = decimal(inflow_of(queue, account) + seconds)
  redis.call('SET', queue.inflow .. ':' .. account, mine .. ' ' .. int(NOW), 'PX', 10 * INFLOW_MEMORY)
  local all = decimal(decayed(totals.inflow, totals.inflow_at) + seconds)
  redis.call('HSET', queue.totals, 'inflow', all, 'inflow_at', int(NOW))
end

-- Slots that are there for an account's own jobs, as far as others keep sending theirs.
local function own_slots(queue, totals, account)
  local others = decayed(totals.inflow, totals.inflow_at) - inflow_of(queue, account)
  return math.max(LEAST_SHARE * totals.slots, totals.slots - math.max(others, 0) / INFLOW_MEMORY * 1000)
end

-- The work before a job that stands behind `ahead` jobs of its tenant: seconds, and the number of jobs.
-- Every other tenant gets its share until the job's own tag comes up.
local function work_before(queue, totals, measures, account, ahead)
  if not totals.units then return 0, 0 end
  local per_job, per_unit = backlog_line(measures)
  local function backlog(other)
    local jobs = redis.call('ZCARD', ready_of(queue, other))
    local tenant = redis.call('HMGET', tenant_of(queue, other), 'units', 'weight')
    return jobs * per_job + (tenant[1] or 0) / 1000 * per_unit, jobs, tonumber(tenant[2] or 1)
  end
  local seconds, jobs, weight = backlog(account)
  local work, position = jobs > 0 and seconds * ahead / jobs or 0, ahead
  local own = redis.call('ZSCORE', queue.tenants, account)
  local tag = tonumber(own or entry_tag(queue, account, math.max(totals.clock or 0, totals.entry or 0)))
  local own_tag = tag + work / weight
  local others = redis.call(
    'ZRANGE', queue.tenants, '-inf', exact(own_tag), 'BYSCORE', 'LIMIT', 0, MAX_TENANTS_SEEN, 'WITHSCORES')
  local before, jobs_before, tenants_before = 0, 0, 0
  for i = 1, #others, 2 do
    if others[i] ~= account then
      seconds, jobs, weight = backlog(others[i])
      -- It starts whole jobs until its tag is beyond ours, one at least.
      local fluid = seconds > 0 and jobs * (own_tag - tonumber(others[i + 1])) * weight / seconds or 0
      local started = math.min(jobs, math.max(1, math.ceil(fluid)))
      before = before + (jobs > 0 and seconds * started / jobs or 0)
      jobs_before = jobs_before + started
      tenants_before = tenants_before + 1
    end
  end
  -- Of very many only the first were looked at; the others are taken to be like them.
  local scale = 1
  if #others == 2 * MAX_TENANTS_SEEN then
    local all = redis.call('ZCOUNT', queue.tenants, '-inf', exact(own_tag))
    scale = (all - (own and 1 or 0)) / math.max(tenants_before, 1)
  end
  return work + scale * before, position + math.floor(scale * jobs_before + 0.5)
end

-- Seconds until an account's job has a slot, with so much work and so many jobs before it; nil when nobody works.
local function wait_for_slot(queue, totals, account, work, position)
  local slots = totals.slots or 0
  if slots <= 0 then return nil end
  if position < slots - redis.call('ZCARD', queue.leases) then return 0 end
  local rest = running_rest(queue, totals) / slots
  return work > 0 and rest + work / own_slots(queue, totals, account) or rest
end

-- Waits that are nothing, of the order of the job itself, or longer: each errs in its own way.
local function bucket_of(wait, seconds)
  if wait <= 0 then return '0' end
  return wait < 3 * seconds and '1' or '2'
end

-- Of a bucket: how many jobs it has seen, and the logarithms of its quantiles p10, p50 and p90.
local function quantiles_of(measures, bucket)
  local seen, p10, p50, p90 = string.match(measures.quantiles[bucket] or NOTHING_SEEN, '(%S+) (%S+) (%S+) (%S+)')
  return tonumber(seen), tonumber(p10), tonumber(p50), tonumber(p90)
end

-- The quantiles after one more job, whose time was exp(error) times what was expected.
local function moved_quantiles(measures, bucket, error)
  local seen, p10, p50, p90 = quantiles_of(measures, bucket)
  local rate = math.max(SLOWEST_RATE, RATE / math.sqrt(seen + 1))
  local function moved(at, share) return at + rate * (share - (error <= at and 1 or 0)) end
  return string.format('%d %.6g %.6g %.6g', seen + 1, moved(p10, 0.1), moved(p50, 0.5), moved(p90, 0.9))
end

-- Learns from a finished job: its own seconds, unless an earlier attempt took part of its steps, and how far off the
-- expected time to completion was.
local function learn(queue, id)
  local v = redis.call('HMGET', job_key(id), 'engine', 'size', 'steps', 'area', 'started', 'expected', 'bucket', 'since',
    'resumed')
  local engine, size, steps, area, bucket = v[1], v[2], tonumber(v[3]), v[4], v[7]
  if not engine then return end
  local seconds, measures = (NOW - v[5]) / 1000, measures_of(queue, engine, size)
  local learned = v[9] and {}
    or { size, with_sample(measures.own, steps, seconds), '*', with_sample(measures.all, steps * area, seconds) }
  if v[6] then
    local error = math.log(math.max(NOW - v[8], 1) / 1000 / tonumber(v[6]))
    learned[#learned + 1], learned[#learned + 2] = 'quantiles:' .. bucket, moved_quantiles(measures, bucket, error)
  end
  if #learned == 0 then return end
  redis.call('HSET', measures.key, unpack(learned))
  redis.call('PEXPIRE', measures.key, KEPT)
  redis.call('HSET', queue.totals, 'engine', engine)
end

-- Expected seconds to completion with their quantiles, for a job that waits and then runs `seconds`.
local function completion(measures, wait, seconds)
  local bucket, expected = bucket_of(wait, seconds), wait + seconds
  local _, p10, p50, p90 = quantiles_of(measures, bucket)
  local middle = expected * math.exp(p50)
  return {
    expected = expected, bucket = bucket,
    p10 = math.min(middle, expected * math.exp(p10)), p50 = middle, p90 = math.max(middle, expected * math.exp(p90)),
  }
end
