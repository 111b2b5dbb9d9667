-- Jobs as they stand. ARGV: queue, number of fields, fields…, ids…
-- Returns per id {fields…, position, p50, p90}: jobs ahead of a queued one, and when a live one is likely to be done
-- (nil where nobody knows); nil for an id without a record.
local count = tonumber(ARGV[2])
local names = { unpack(ARGV, 3, 2 + count) }

local function position_and_eta(id)
  local job = redis.call('HMGET', job_key(id), 'state', 'account', 'seconds', 'size', 'steps', 'area', 'started', 'since')
  if job[1] ~= 'queued' and job[1] ~= 'running' then return false, nil end
  local queue = keys_of_job(id)
  local seconds, measured = service_seconds(queue, job[4], tonumber(job[5]), tonumber(job[6]))
  if job[1] == 'running' then
    return false, measured and completion(queue, 0, seconds), tonumber(job[7])
  end
  local rank = redis.call('ZRANK', queue.ready .. job[2], id)
  if not rank then
    return false, measured and completion(queue, 0, seconds), tonumber(redis.call('ZSCORE', queue.delayed, id) or NOW)
  end
  local work, position = work_before(queue, job[2], rank)
  local wait = wait_for_slot(queue, work, position)
  return position, wait and measured and completion(queue, wait, seconds), NOW
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
