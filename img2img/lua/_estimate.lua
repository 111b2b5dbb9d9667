-- When a job will be done. The expected time (the work before it over the workers' slots, and its own) is corrected by what
-- such expectations turned out to be worth: quantiles of actual over expected time, per bucket of waiting time, tracked
-- by stochastic approximation (Robbins and Monro 1951; Gibbs and Candes 2021 call it adaptive conformal inference).
-- Whatever the load, half of the jobs end before p50 and nine of ten before p90 in the long run.

local MAX_TENANTS_SEEN = 100
local FIRST_P90 = 0.5
local SLOWEST_RATE = 0.03

-- The work before a job that stands behind `ahead` jobs of its tenant: seconds, and the number of jobs.
-- Every other tenant gets its share until the job's own tag comes up.
local function work_before(queue, account, ahead)
  local per_job, per_unit = backlog_line(queue)
  local function backlog(other)
    local jobs = redis.call('ZCARD', queue.ready .. other)
    return jobs * per_job + number_of(queue.tenant .. other, 'units') * per_unit, jobs
  end
  local seconds, jobs = backlog(account)
  local work, position = jobs > 0 and seconds * ahead / jobs or 0, ahead
  local tag = tonumber(redis.call('ZSCORE', queue.tenants, account) or entry_tag(queue, account))
  local weight = tonumber(redis.call('HGET', queue.tenant .. account, 'weight') or 1)
  local own_tag = tag + work / weight
  local others = redis.call(
    'ZRANGE', queue.tenants, '-inf', decimal(own_tag), 'BYSCORE', 'LIMIT', 0, MAX_TENANTS_SEEN, 'WITHSCORES')
  for i = 1, #others, 2 do
    if others[i] ~= account then
      seconds, jobs = backlog(others[i])
      weight = tonumber(redis.call('HGET', queue.tenant .. others[i], 'weight') or 1)
      local share = math.min(seconds, (own_tag - tonumber(others[i + 1])) * weight)
      work = work + share
      position = position + (seconds > 0 and math.ceil(jobs * share / seconds) or 0)
    end
  end
  return work, position
end

-- Seconds until `work` seconds of ready jobs have been started, or nil when nobody works.
local function wait_for_slot(queue, work, position)
  local slots = number_of(queue.totals, 'slots')
  if slots <= 0 then return nil end
  local running = redis.call('ZCARD', queue.leases)
  if position < slots - running then return 0 end
  local elapsed = (running * NOW - number_of(queue.totals, 'running_since')) / 1000
  return (math.max(0, number_of(queue.totals, 'running_seconds') - elapsed) + work) / slots
end

-- Waits that are nothing, of the order of the job itself, or longer: each errs in its own way.
local function bucket_of(wait, seconds)
  if wait <= 0 then return '0' end
  return wait < 3 * seconds and '1' or '2'
end

local function quantile(key, name, bucket)
  local log = redis.call('HGET', key, name .. ':' .. bucket)
  return math.exp(tonumber(log or (name == 'p90' and FIRST_P90 or 0)))
end

-- Learns from a finished job: its own seconds, and how far off the expected time to completion was.
local function learn(queue, id)
  local job = redis.call('HMGET', job_key(id), 'engine', 'size', 'steps', 'area', 'started', 'expected', 'bucket', 'since')
  if not job[1] or not job[5] then return end
  local key, steps, seconds = queue.service .. job[1], tonumber(job[3]), (NOW - job[5]) / 1000
  add_sample(key, job[2], steps, seconds)
  add_sample(key, '*', steps * job[4], seconds)
  redis.call('HSET', queue.totals, 'engine', job[1])
  if job[6] then
    local error = math.log(math.max(NOW - job[8], 1) / 1000 / tonumber(job[6]))
    local seen = redis.call('HINCRBY', key, 'seen:' .. job[7], 1)
    local rate = math.max(SLOWEST_RATE, 0.3 / math.sqrt(seen))
    for name, share in pairs({ p50 = 0.5, p90 = 0.9 }) do
      local at = math.log(quantile(key, name, job[7]))
      redis.call('HSET', key, name .. ':' .. job[7], decimal(at + rate * (share - (error <= at and 1 or 0))))
    end
  end
  redis.call('PEXPIRE', key, KEPT)
end

-- Expected seconds to completion with its p50 and p90, for a job that waits and then runs `seconds`.
local function completion(queue, wait, seconds)
  local key, bucket = engine_key(queue), bucket_of(wait, seconds)
  local expected = wait + seconds
  local p50 = expected * quantile(key, 'p50', bucket)
  return { expected = expected, bucket = bucket, p50 = p50, p90 = math.max(p50, expected * quantile(key, 'p90', bucket)) }
end
