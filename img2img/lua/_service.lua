-- How long work takes, from what was measured.
-- `service:<queue>:<engine>` holds, per size of picture, decaying sums over finished jobs of their steps and seconds, from
-- which a line (a part per job and a part per step) is fitted by least squares; the field `*` is over all sizes, by
-- steps times relative area, for sizes not seen yet and for
-- whole backlogs.

local DECAY = 0.98
local UNKNOWN_STEP_SECONDS = 0.05
local KEPT = 7 * 24 * 3600 * 1000

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

-- The line through the samples, as seconds per job and seconds per unit of x. Where all samples lie close together it
-- goes through the origin; neither part is negative.
local function line_of(s)
  local mean_x, mean_t = s.x / s.n, s.t / s.n
  local variance = s.xx / s.n - mean_x * mean_x
  local through_origin = mean_t / mean_x
  local slope = through_origin
  if variance > 1e-4 * mean_x * mean_x then
    slope = math.min(math.max((s.xt / s.n - mean_x * mean_t) / variance, 0), through_origin)
  end
  return mean_t - slope * mean_x, slope
end

-- Seconds that `jobs` jobs of together `x` run, by the samples of `name`; nil where there are none.
local function fitted(key, name, jobs, x)
  local s = key and sums_of(key, name)
  if not s then return nil end
  local per_job, per_unit = line_of(s)
  return math.max(jobs * per_job + x * per_unit, 0.001 * jobs)
end

-- Seconds that a job will run, and whether that is known from measurements.
local function service_seconds(queue, size, steps, area)
  local key = engine_key(queue)
  local seconds = fitted(key, size, 1, steps) or fitted(key, '*', 1, steps * area)
  return seconds or UNKNOWN_STEP_SECONDS * steps * area, seconds ~= nil
end

-- A backlog's seconds per job and per unit of its sum.
local function backlog_line(queue)
  local key = engine_key(queue)
  local all = key and sums_of(key, '*')
  if not all then return 0, UNKNOWN_STEP_SECONDS end
  return line_of(all)
end

local function relative_area(queue, pixels)
  local native = number_of(queue.totals, 'pixels')
  return (pixels > 0 and native > 0) and pixels / native or 1
end

