-- How long work takes and when a job will be done, from what was measured.
-- `service:<queue>:<engine>` holds, per size of picture, decaying sums over finished jobs of their steps and seconds, from
-- which a line (a part per job and a part per step) is fitted by least squares; the field `*` is over all sizes, by
-- steps times relative area, for sizes not seen yet. It also holds, per bucket of waiting time, the quantiles of
-- (actual / expected) time to completion, tracked by stochastic approximation (Robbins and Monro 1951; as adaptive
-- conformal inference, Gibbs and Candes 2021): whatever the load, half of the jobs end before p50 and nine of ten
-- before p90 in the long run.

local DECAY = 0.98
local UNKNOWN_STEP_SECONDS = 0.05
local KEPT = 7 * 24 * 3600 * 1000
local MAX_TENANTS_SEEN = 100
local FIRST_P90 = 0.5
local SLOWEST_RATE = 0.03

local function engine_key(queue)
  local engine = redis.call('HGET', queue.totals, 'engine')
  return engine and queue.service .. engine
end

local function sums_of(key, name)
  local text = redis.call('HGET', key, name)
  if not text then return nil end
  local n, x, t, xx, xt = string.match(text, '(%S+) (%S+) (%S+) (%S+) (%S+)')
  return { n = tonumber(n), x = tonumber(x), t = tonumber(t), xx = tonumber(xx), xt = tonumber(xt) }
end

local function add_sample(key, name, x, seconds)
  local s = sums_of(key, name) or { n = 0, x = 0, t = 0, xx = 0, xt = 0 }
  local function decayed(sum, amount) return decimal(sum * DECAY + amount) end
  local text = { decayed(s.n, 1), decayed(s.x, x), decayed(s.t, seconds), decayed(s.xx, x * x), decayed(s.xt, x * seconds) }
  redis.call('HSET', key, name, table.concat(text, ' '))
end

-- The line's value at x. Where all samples lie close together it goes through the origin; it never falls with x.
local function fitted(s, x)
  local mean_x, mean_t = s.x / s.n, s.t / s.n
  local variance = s.xx / s.n - mean_x * mean_x
  local through_origin = mean_t / mean_x
  local slope = through_origin
  if variance > 1e-4 * mean_x * mean_x then
    slope = math.min(math.max((s.xt / s.n - mean_x * mean_t) / variance, 0), through_origin)
  end
  return math.max(mean_t + slope * (x - mean_x), 0.001)
end

-- Seconds that a job will run, and whether that is known from measurements.
local function service_seconds(queue, size, steps, area)
  local key = engine_key(queue)
  local own = key and sums_of(key, size)
  if own then return fitted(own, steps), true end
  local all = key and sums_of(key, '*')
  if all then return fitted(all, steps * area), true end
  return UNKNOWN_STEP_SECONDS * steps * area, false
end

local function relative_area(queue, pixels)
  local native = number_of(queue.totals, 'pixels')
  return (pixels > 0 and native > 0) and pixels / native or 1
end

-- The work before a job that stands behind `ahead` jobs of its tenant: seconds, and the number of jobs.
-- Every other tenant gets its share until the job's own tag comes up.
local function work_before(queue, account, ahead)
  local function backlog(other)
    local seconds = number_of(queue.tenant .. other, 'seconds')
    return seconds, redis.call('ZCARD', queue.ready .. other)
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
