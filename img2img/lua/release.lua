-- Gives a claimed job back: after a failed attempt (spent) or an interruption (not spent).
-- ARGV: queue, id, fence, spent ('1' | ''), delay ms, code, message
-- Returns 1, or 0 when the claim was lost
local id, fence, spent, delay, code, message = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop')
if job[1] ~= fence or job[2] ~= 'running' then return 0 end
if spent == '1' or job[3] then
  retry_or_end(id, delay, code, message)
else
  requeue(id, delay, cjson.encode({ error = { code = code, message = message } }))
end
return 1
