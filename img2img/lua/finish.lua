-- Ends a running job, if the caller still holds it. Running it twice answers the same.
-- ARGV: queue, id, fence, state, outcome (JSON)
-- Returns 1, or 0 when the claim was lost
local id, fence, state, outcome = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'outcome')
if job[1] ~= fence then return 0 end
if job[2] == 'running' then
  if state == 'failed' then
    local error = cjson.decode(outcome).error
    if type(error) == 'table' then note_attempt(id, 'failures', error.code, error.message) end
  end
  finalize(id, state, outcome)
end
return 1
