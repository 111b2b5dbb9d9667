-- How much waits and runs. ARGV: queue
-- Returns {waiting, delayed of them, running, quarantined, estimated seconds of what is ready, {worker info…}}
local per_job, per_unit = backlog_line(OWN)
local seconds = number_of(OWN.totals, 'ready') * per_job + number_of(OWN.totals, 'units') * per_unit
return {
  redis.call('ZCARD', OWN.expiry), redis.call('ZCARD', OWN.delayed), redis.call('ZCARD', OWN.leases),
  redis.call('ZCARD', OWN.quarantine), decimal(seconds), redis.call('HVALS', OWN.worker_info),
}
