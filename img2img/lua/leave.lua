-- A waiter goes; the last one starts the grace period, after which the job is canceled.
-- ARGV: queue, id, waiter, grace ms
local id, waiters, grace = ARGV[2], P .. 'waiters:' .. ARGV[2], tonumber(ARGV[4])
local queue = queue_named(field(id, 'queue'))
redis.call('ZREM', waiters, ARGV[3])
redis.call('ZREMRANGEBYSCORE', waiters, '-inf', int(NOW))
if redis.call('ZCARD', waiters) == 0 and redis.call('ZSCORE', queue.abandon, id) then
  redis.call('ZADD', queue.abandon, int(NOW + grace), id)
end
sweep()
