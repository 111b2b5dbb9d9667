-- Notes what an upstream's answer said of its account.
-- ARGV: queue (none), account, credential, pictures, neurons, ms for which it takes no more calls with that credential,
--   whether the account's day is used up (1 | 0): until the next 00:00 UTC it is parked then,
--   ms from 00:00 UTC on in which that may be about the day before: for a moment only it is parked then
local DAY, KEPT = 86400000, 35 * 86400000
local MOMENT = 60000
local account, pictures, neurons, held = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local today = math.floor(NOW / DAY)
if pictures > 0 or neurons > 0 then
  local cost = P .. 'upstream-cost:' .. account .. ':' .. int(today)
  redis.call('HINCRBY', cost, 'pictures', pictures)
  redis.call('HINCRBYFLOAT', cost, 'neurons', decimal(neurons))
  redis.call('PEXPIRE', cost, KEPT)
end
local hold = P .. 'upstream-held:' .. ARGV[3]
if held > 0 and held > redis.call('PTTL', hold) then redis.call('SET', hold, 1, 'PX', int(held)) end
if ARGV[7] == '1' then
  local is_new_day = NOW - today * DAY < tonumber(ARGV[8])
  redis.call('SET', P .. 'upstream-parked:' .. account, 1, 'PX', int(is_new_day and MOMENT or (today + 1) * DAY - NOW))
end
