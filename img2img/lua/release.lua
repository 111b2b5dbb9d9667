-- Gives a claimed job back after an attempt without a result. Running it twice answers the same.
-- ARGV: queue, id, fence, kind ('failures' | 'interruptions'), delay ms, code, message
-- Returns 1, or 0 when the claim was lost
local id, fence, kind, delay, code, message = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'released')
if job[3] == fence then return 1 end
if job[1] ~= fence or job[2] ~= 'running' then return 0 end
retry_or_end(id, kind, delay, code, message)
redis.call('HSET', job_key(id), 'released', fence)
return 1
