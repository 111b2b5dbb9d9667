-- Shows what a running attempt has so far, as a `preview` event; the log keeps the picture of the latest one only.
-- ARGV: queue, id, fence, the event's data with the picture (JSON), the same without it
-- Returns 'ok' | 'lost' | the reason why the job should stop
local id, fence, whole, bare = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop', 'preview')
if job[1] ~= fence or job[2] ~= 'running' then return 'lost' end
strip_preview(id, job[4])
local number = emit(id, 'preview', whole)
redis.call('HSET', job_key(id), 'preview', int(number) .. ' ' .. event_text('preview', bare))
return job[3] or 'ok'
