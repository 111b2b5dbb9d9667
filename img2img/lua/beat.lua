-- Keeps a worker registered and its claims alive.
-- ARGV: queue, worker, worker ttl ms, worker info (JSON with "slots"), lease ms, {id, fence}…
-- Returns per claim: 'ok' | 'lost' | the reason why it should stop
local worker, ttl, info, lease = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
redis.call('ZADD', WORKERS, int(NOW + ttl), worker)
redis.call('HSET', WORKER_INFO, worker, info)
local answers = {}
for i = 6, #ARGV, 2 do
  local id, fence = ARGV[i], ARGV[i + 1]
  local job = redis.call('HMGET', job_key(id), 'fence', 'state', 'stop')
  local answer = 'lost'
  if job[1] == fence and job[2] == 'running' then
    redis.call('ZADD', OWN.leases, 'XX', int(NOW + lease), id)
    redis.call('PEXPIRE', 'arq:in-progress:' .. arq_id(id), int(lease))
    answer = job[3] or 'ok'
  end
  answers[#answers + 1] = answer
end
sweep()
return answers
