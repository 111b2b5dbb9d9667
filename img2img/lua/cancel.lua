-- Asks a job to stop, in any state. ARGV: queue, id, reason. Returns its state, or nil when there is none.
return request_stop(ARGV[2], ARGV[3])
