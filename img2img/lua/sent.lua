-- Records that a running attempt is about to make a call that may be billed, or that this call's answer is known.
-- Running it twice changes nothing.
-- ARGV: queue, id, fence, number of the call in its attempt,
--   what to do with the job if the answer is lost ('retry' | 'fail'), or '' when it is known,
--   whether the call was billed though it brought no picture (1 | 0)
-- Returns 'ok' | 'lost' | 'unaffordable <seconds until one may be made>' | the reason why the job should stop
local id, fence, call, on_lost, billed = ARGV[2], ARGV[3], ARGV[3] .. ' ' .. ARGV[4], ARGV[5], ARGV[6]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop', 'sent', 'call')
if job[1] ~= fence or job[2] ~= 'running' then return 'lost' end
local is_repeated = job[5] == call
-- A late word about an earlier call says nothing about this one. Where the job is to stop the call is not made after all.
if job[4] and is_repeated and (on_lost == '' or job[3]) then
  if billed == '0' then unpay(id) end
  redis.call('HDEL', job_key(id), 'sent')
elseif on_lost ~= '' and not is_repeated then
  if job[3] then return job[3] end
  if not pay(id) then return unaffordable() end
  redis.call('HSET', job_key(id), 'sent', on_lost, 'call', call)
end
return job[3] or 'ok'
