-- Keeps a worker registered and its claims alive.
-- ARGV: queue, worker, worker ttl ms, worker info (JSON), slots, native pixels, lease ms, {id, fence}…
-- Returns per claim: 'ok' | 'lost' | the reason why it should stop
local worker, ttl, info, slots, pixels, lease = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7]
redis.call('ZADD', OWN.workers, int(NOW + ttl), worker)
redis.call('HSET', OWN['worker-info'], worker, info)
redis.call('HSET', OWN.totals, 'pixels', pixels)
set_slots(worker, slots)
local answers = {}
for i = 8, #ARGV, 2 do
  local id, fence = ARGV[i], ARGV[i + 1]
  local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop')
  local answer = 'lost'
  if job[1] == fence and job[2] == 'running' then
    redis.call('ZADD', OWN.leases, 'XX', int(NOW + lease), id)
    redis.call('PEXPIRE', 'arq:in-progress:' .. arq_id(id), lease)
    answer = job[3] or 'ok'
  end
  answers[#answers + 1] = answer
end
sweep()
return answers
