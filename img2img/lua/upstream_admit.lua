-- Lets one call to an upstream pass, within what each account and each token may send. All workers share the limits.
-- Of the accounts that may send now the one with most room is taken. A window is the list of the times of its latest calls,
-- never longer than the limit: another call may go when the one that many calls ago has left the window. That is exact, and
-- what it costs does not depend on the limit.
-- ARGV: queue (none), calls and ms of an account's window, calls and ms of a token's, whether the call is made (1) or
--   somebody only asks (0), then of each: account, credential
-- Returns {number of the chosen one, from 1} | {0, ms until one may go, 'parked' | 'held' | 'limited'}
local DAY, KEPT = 86400000, 35 * 86400000
-- So many calls at most leave a window at a time; those that stay longer only make it look fuller.
local TRIM = 32

local function window(key, calls, ms) return { key = P .. 'upstream-calls:' .. key, calls = tonumber(calls), ms = tonumber(ms) } end

-- Milliseconds until the window has room, and how much of it is free, 0 to 1.
local function look(w)
  for _ = 1, TRIM do
    local oldest = redis.call('LINDEX', w.key, 0)
    if not oldest or oldest + w.ms > NOW then break end
    redis.call('LPOP', w.key)
  end
  local length = redis.call('LLEN', w.key)
  if length < w.calls then return 0, 1 - length / w.calls end
  return math.max(0, redis.call('LINDEX', w.key, length - w.calls) + w.ms - NOW), 0
end

local function note(w)
  redis.call('RPUSH', w.key, int(NOW))
  redis.call('LTRIM', w.key, -w.calls, -1)
  redis.call('PEXPIRE', w.key, int(w.ms))
end

local best, soonest, why, room = nil, nil, nil, -1

local function must_wait(ms, reason)
  if not soonest or ms < soonest then soonest, why = ms, reason end
end

for i = 7, #ARGV, 2 do
  local account, token = window(ARGV[i], ARGV[2], ARGV[3]), window('token:' .. ARGV[i + 1], ARGV[4], ARGV[5])
  local parked = redis.call('PTTL', P .. 'upstream-parked:' .. ARGV[i])
  local held = redis.call('PTTL', P .. 'upstream-held:' .. ARGV[i + 1])
  local account_wait, account_room = look(account)
  local token_wait, token_room = look(token)
  local limited = math.max(account_wait, token_wait)
  if parked > 0 then
    must_wait(math.max(parked, held), 'parked')
  elseif held > 0 then
    must_wait(math.max(held, limited), 'held')
  elseif limited > 0 then
    must_wait(limited, 'limited')
  elseif math.min(account_room, token_room) > room then
    best, room = { number = (i - 5) / 2, id = ARGV[i], account = account, token = token }, math.min(account_room, token_room)
  end
end

if not best then return { 0, math.ceil(soonest), why } end
if ARGV[6] == '0' then return { best.number } end
note(best.account)
note(best.token)
local cost = P .. 'upstream-cost:' .. best.id .. ':' .. int(math.floor(NOW / DAY))
redis.call('HINCRBY', cost, 'calls', 1)
redis.call('PEXPIRE', cost, KEPT)
redis.call('ZADD', P .. 'upstream-accounts', int(NOW), best.id)
redis.call('PEXPIRE', P .. 'upstream-accounts', KEPT)
return { best.number }
