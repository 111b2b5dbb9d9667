-- Records what a running attempt reports, as a `progress` event.
-- ARGV: queue, id, fence, running (JSON)
-- Returns 'ok' | 'lost' | the reason why it should stop
local id, fence, running = ARGV[2], ARGV[3], ARGV[4]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop')
if job[1] ~= fence or job[2] ~= 'running' then return 'lost' end
redis.call('HSET', job_key(id), 'running', running)
emit(id, 'progress', running)
return job[3] or 'ok'
