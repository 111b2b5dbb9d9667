-- Records where the state of a running attempt lies, for the next one to go on from; what was recorded before is not
-- needed any more. Running it twice changes nothing.
-- ARGV: queue, id, fence, checkpoint (JSON)
-- Returns 'ok' | 'lost' | the reason why the job should stop
local id, fence, checkpoint = ARGV[2], ARGV[3], ARGV[4]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop', 'checkpoint')
if job[1] ~= fence or job[2] ~= 'running' then return 'lost' end
if job[4] and job[4] ~= checkpoint then discard(cjson.decode(job[4]).blob, 0) end
redis.call('HSET', job_key(id), 'checkpoint', checkpoint, 'checkpoint_fence', fence)
return job[3] or 'ok'
