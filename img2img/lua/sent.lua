-- Records that a running attempt is about to make a call that may be billed, or that this call's answer is known.
-- Running it twice changes nothing.
-- ARGV: queue, id, fence, what to do with the job if the answer is lost ('retry' | 'fail'), or '' when it is known
-- Returns 'ok' | 'lost' | the reason why the job should stop
local id, fence, on_lost = ARGV[2], ARGV[3], ARGV[4]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop')
if job[1] ~= fence or job[2] ~= 'running' then return 'lost' end
if on_lost == '' then redis.call('HDEL', job_key(id), 'sent') else redis.call('HSET', job_key(id), 'sent', on_lost) end
return job[3] or 'ok'
