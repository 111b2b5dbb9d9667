-- How much waits and runs. ARGV: queue
-- Returns {waiting, delayed of them, running, quarantined, estimated seconds of what is ready, those that are left of what
--   runs, {worker info…}, ms for which the job has waited that has been able to start for longest}
local totals = totals_of(OWN)
local measures = measures_of(OWN, totals.engine, '*')
local per_job, per_unit = backlog_line(measures)
local waiting, delayed = redis.call('ZCARD', OWN.expiry), redis.call('ZCARD', OWN.delayed)
local suspects = redis.call('ZCARD', OWN.suspects)
local fresh = waiting - delayed - suspects
local seconds = fresh * per_job + (totals.units or 0) / 1000 * per_unit + suspects * mean_seconds(measures)
local first = redis.call('ZRANGE', OWN.startable, 0, 0, 'WITHSCORES')
return {
  waiting, delayed, redis.call('ZCARD', OWN.leases), redis.call('ZCARD', OWN.quarantine),
  -- Whoever starts workers must see that there is work, however short it was measured to be.
  decimal(math.max(seconds, LEAST_SECONDS * (waiting - delayed))), decimal(running_rest(OWN, totals)),
  redis.call('HVALS', OWN['worker-info']), first[2] and math.max(0, NOW - first[2]) or 0,
}
