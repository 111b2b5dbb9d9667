-- Renews a waiter's interest. ARGV: queue, id, waiter, ttl ms, grace ms
if redis.call('ZSCORE', OWN.abandon, ARGV[2]) then
  wait_for(ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]))
end
