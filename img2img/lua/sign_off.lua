-- Forgets a worker that holds nothing, and rings once for the wake token that it may have taken. What it was handed in a
-- claim whose answer it did not wait for goes back. ARGV: queue, worker
local _, ids = string.match(redis.call('GET', P .. 'claimed:' .. ARGV[2]) or '', '^(%S+) (.*)$')
for id in string.gmatch(ids or '', '%S+') do
  local job = redis.call('HMGET', job_key(id), 'state', 'worker')
  if job[1] == 'running' and job[2] == ARGV[2] then
    retry_or_end(id, 'interruptions', 0, 'interrupted', 'The worker is shutting down')
  end
end
redis.call('DEL', P .. 'claimed:' .. ARGV[2])
forget_worker(ARGV[2])
redis.call('DEL', P .. 'control:' .. ARGV[2])
wake(OWN)
