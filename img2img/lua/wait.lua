-- Renews a waiter's interest. ARGV: queue, id, waiter, ttl ms, grace ms
if redis.call('ZSCORE', queue_named(field(ARGV[2], 'queue')).abandon, ARGV[2]) then
  wait_for(ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]))
end
