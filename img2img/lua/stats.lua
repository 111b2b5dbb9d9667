-- How much waits and runs. ARGV: queue
-- Returns {waiting, delayed of them, running, quarantined, estimated seconds of what is ready, {worker info…},
--   ms for which the job has waited that has been able to start for longest}
local totals = totals_of(OWN)
local per_job, per_unit = backlog_line(measures_of(OWN, totals.engine, '*'))
local waiting, delayed = redis.call('ZCARD', OWN.expiry), redis.call('ZCARD', OWN.delayed)
local ready = waiting - delayed - redis.call('ZCARD', OWN.suspects)
local seconds = ready * per_job + (totals.units or 0) / 1000 * per_unit
local first = redis.call('ZRANGE', OWN.startable, 0, 0, 'WITHSCORES')
return {
  waiting, delayed, redis.call('ZCARD', OWN.leases), redis.call('ZCARD', OWN.quarantine), decimal(seconds), redis.call('HVALS', OWN['worker-info']),
  first[2] and math.max(0, NOW - first[2]) or 0,
}
