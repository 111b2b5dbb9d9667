-- Jobs as they stand. ARGV: queue, number of fields, fields…, ids…
-- Returns per id {fields…, position, p50, p90}: jobs ahead of a queued one, and when a live one is likely to be done
-- (nil where nobody knows); nil for an id without a record.
local count = tonumber(ARGV[2])
local names = { unpack(ARGV, 3, 2 + count) }

local totals_seen, measures_seen = {}, {}

local function totals_and_measures(queue, size)
  local totals = totals_seen[queue.name] or totals_of(queue)
  totals_seen[queue.name] = totals
  local name = queue.name .. ' ' .. size
  measures_seen[name] = measures_seen[name] or measures_of(queue, totals.engine, size)
  return totals, measures_seen[name]
end

local function position_and_eta(id)
  local job = redis.call('HMGET', job_key(id), 'state', 'account', 'size', 'steps', 'area', 'started', 'queue')
  if job[1] ~= 'queued' and job[1] ~= 'running' then return false, nil end
  local queue = queue_named(job[7])
  local totals, measures = totals_and_measures(queue, job[3])
  local seconds, measured = service_seconds(measures, tonumber(job[4]), tonumber(job[5]))
  local rank = job[1] == 'queued' and redis.call('ZRANK', ready_of(queue, job[2]), id)
  if not rank then
    local start = job[1] == 'running' and job[6] or redis.call('ZSCORE', queue.delayed, id) or NOW
    return false, measured and completion(measures, 0, seconds), tonumber(start)
  end
  local work, position = work_before(queue, totals, measures, job[2], rank)
  local wait = wait_for_slot(queue, totals, job[2], work, position)
  return position, wait and measured and completion(measures, wait, seconds), NOW
end

local found = {}
for i = 3 + count, #ARGV do
  local row = redis.call('HMGET', job_key(ARGV[i]), unpack(names))
  if row[1] then
    local position, eta, from = position_and_eta(ARGV[i])
    row[#row + 1] = position or false
    row[#row + 1] = eta and int(math.max(NOW, from + 1000 * eta.p50)) or false
    row[#row + 1] = eta and int(math.max(NOW, from + 1000 * eta.p90)) or false
  end
  found[#found + 1] = row[1] and row or false
end
return found
