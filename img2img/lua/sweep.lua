-- Upkeep by a process that does not claim. ARGV: queue
-- Moves jobs on whose pool lets them wait too long, too.
-- Returns {ms until more is due or -1, '<ms to keep> <input blob that no job needs any more>', …}. Each of these is told
-- again after a while, until it is struck off DISCARDING.
local PATIENCE = 60000
sweep()
local words = redis.call('LPOP', DISCARD, 100) or redis.call(
  'ZRANGEBYSCORE', DISCARDING, '-inf', int(NOW - PATIENCE), 'LIMIT', 0, 100)
for _, word in ipairs(words) do redis.call('ZADD', DISCARDING, int(NOW), word) end
return { overflow(OWN) and 0 or next_due(), unpack(words) }
