-- How much waits and runs. ARGV: queue
-- Returns {waiting, delayed of them, running, quarantined, estimated seconds of what is ready, {worker info…}}
local totals = totals_of(OWN)
local per_job, per_unit = backlog_line(measures_of(OWN, totals.engine, '*'))
local waiting, delayed = redis.call('ZCARD', OWN.expiry), redis.call('ZCARD', OWN.delayed)
local ready = waiting - delayed - redis.call('ZCARD', OWN.suspects)
local seconds = ready * per_job + (totals.units or 0) / 1000 * per_unit
return {
  waiting, delayed, redis.call('ZCARD', OWN.leases), redis.call('ZCARD', OWN.quarantine), decimal(seconds), redis.call('HVALS', OWN['worker-info']),
}
