-- Upkeep by a process that does not claim. ARGV: queue
-- Returns {ms until more is due or -1, '<ms to keep> <input blob that no job needs any more>', …}
sweep()
local discarded = redis.call('LPOP', DISCARD, 100) or {}
return { next_due(), unpack(discarded) }
