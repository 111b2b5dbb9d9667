-- Runs an ended job again under its id, as if it had just been submitted; its log and its history go on.
-- ARGV: queue, id, lifetime ms
-- Returns its state before, 'discarding' when its input is being deleted, 'unaffordable <seconds>' when every pool that it
-- may go to costs more than may be spent today, or nil when there is none; only a failed, canceled or expired one is queued
-- anew.
local id, lifetime = ARGV[2], tonumber(ARGV[3])
local key, arq = job_key(id), arq_id(id)
local state = field(id, 'state')
if state ~= 'failed' and state ~= 'canceled' and state ~= 'expired' then return state end
local quarantined_in = queue_named(field(id, 'queue')).quarantine
local routes, choice = routed(id), nil
if routes then
  routes.since, routes.expires, routes.score, routes.ran = NOW, NOW + lifetime, int(NOW - field(id, 'boost')), nil
  choice = best_of(cjson.decode(routes.pools), routes, function(pool) return not is_affordable(pool, routes.account) end)
  if not choice then return unaffordable() end
end
if not keep_inputs(id) then return 'discarding' end
local ttl = int(lifetime + field(id, 'keep'))
redis.call('HDEL', key, 'outcome', 'finished', 'started', 'stop', 'running', 'worker', 'fence', 'quarantined', 'sent', 'call',
  'charged', 'expected', 'ran', 'failures', 'crashes', 'interruptions')
redis.call('HSET', key, 'state', 'queued', 'expires', int(NOW + lifetime), 'score', int(NOW - field(id, 'boost')), 'since', int(NOW))
local replays = redis.call('HINCRBY', key, 'replays', 1)
if choice then assign(id, routes, choice) end
local job, queue = placing_of(id)
redis.call('PEXPIRE', key, ttl)
redis.call('PEXPIRE', P .. 'events:' .. id, ttl)
redis.call('DEL', 'arq:result:' .. arq)
redis.call('SET', 'arq:job:' .. arq, arq_payload(id), 'PX', ttl)
redis.call('ZADD', queue.alive, int(NOW), arq)
redis.call('ZREM', quarantined_in, id)
enqueue(queue, id, job, NOW, '{"replays":' .. replays .. '}')
return state
