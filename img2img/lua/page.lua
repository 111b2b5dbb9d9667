-- The ids of an account's jobs, newest first. ARGV: queue, account, the id that they come after or '', how many
-- None when that id is not listed (any more): everything after it has gone before it.
local mine, first = P .. 'account:' .. ARGV[2], 0
if ARGV[3] ~= '' then
  local rank = redis.call('ZREVRANK', mine, ARGV[3])
  if not rank then return {} end
  first = rank + 1
end
return redis.call('ZREVRANGE', mine, first, first + ARGV[4] - 1)
