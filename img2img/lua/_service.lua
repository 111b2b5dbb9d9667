-- How long work takes, from what was measured.
-- `service:<queue>:<engine>` holds, per size of picture, decaying sums over finished jobs of their steps and seconds, from
-- which a line (a part per job and a part per step) is fitted by least squares; the field `*` is over all sizes, by
-- units (steps times relative area), for sizes not seen yet and for whole backlogs.

local DECAY = 0.98
local UNKNOWN_UNIT_SECONDS = 0.05
local UNKNOWN_UNITS = 20
local LEAST_SECONDS = 0.001
local KEPT = 7 * 24 * 3600 * 1000

-- The queue's counters, as numbers (nil where there is none) but for `engine`.
local function totals_of(queue)
  local names = { 'engine', 'clock', 'pixels', 'slots', 'units', 'running_ms', 'running_since',
    'inflow', 'inflow_at', 'entry', 'unserved' }
  local values, totals = redis.call('HMGET', queue.totals, unpack(names)), {}
  for i, name in ipairs(names) do totals[name] = tonumber(values[i] or nil) end
  totals.engine = values[1]
  return totals
end

-- What was measured of an engine: sums for a size and over all, and the quantiles per bucket. Nil without an engine.
local function measures_of(queue, engine, size)
  if not engine then return nil end
  local key = queue.service .. ':' .. engine
  local v = redis.call('HMGET', key, size, '*', 'quantiles:0', 'quantiles:1', 'quantiles:2')
  return { key = key, own = v[1], all = v[2], quantiles = { ['0'] = v[3], ['1'] = v[4], ['2'] = v[5] } }
end

local function numbers_in(text)
  local n, x, t, xx, xt = string.match(text, '(%S+) (%S+) (%S+) (%S+) (%S+)')
  return tonumber(n), tonumber(x), tonumber(t), tonumber(xx), tonumber(xt)
end

local function with_sample(text, x, seconds)
  local n, sx, t, xx, xt = numbers_in(text or '0 0 0 0 0')
  return string.format('%.9g %.9g %.9g %.9g %.9g',
    n * DECAY + 1, sx * DECAY + x, t * DECAY + seconds, xx * DECAY + x * x, xt * DECAY + x * seconds)
end

-- The line through the samples, as seconds per job and seconds per unit of x. Where all samples lie close together it
-- goes through the origin; neither part is negative.
local function line_of(text)
  local n, x, t, xx, xt = numbers_in(text)
  local mean_x, mean_t = x / n, t / n
  local variance, through_origin = xx / n - mean_x * mean_x, mean_t / mean_x
  local slope = through_origin
  if variance > 1e-4 * mean_x * mean_x then
    slope = math.min(math.max((xt / n - mean_x * mean_t) / variance, 0), through_origin)
  end
  return mean_t - slope * mean_x, slope
end

-- A backlog's seconds per job and per unit.
local function backlog_line(measures)
  if not (measures and measures.all) then return 0, UNKNOWN_UNIT_SECONDS end
  return line_of(measures.all)
end

-- Seconds that a job will run, and whether that is known from measurements.
local function service_seconds(measures, steps, area)
  local known = measures and (measures.own or measures.all)
  if not known then return UNKNOWN_UNIT_SECONDS * steps * area, false end
  local per_job, per_x = line_of(known)
  return math.max(per_job + per_x * (measures.own and steps or steps * area), LEAST_SECONDS), true
end

-- The mean seconds of a job of which nothing but its engine is known.
local function mean_seconds(measures)
  if not (measures and measures.all) then return UNKNOWN_UNITS * UNKNOWN_UNIT_SECONDS end
  local n, _, seconds = numbers_in(measures.all)
  return seconds / n
end

-- Seconds that are left of all that runs; jobs that take longer than expected make up for others' time.
local function running_rest(queue, totals)
  local elapsed = redis.call('ZCARD', queue.leases) * NOW - (totals.running_since or 0)
  return math.max(0, (totals.running_ms or 0) - elapsed) / 1000
end

local function relative_area(totals, pixels)
  return (pixels > 0 and (totals.pixels or 0) > 0) and pixels / totals.pixels or 1
end
