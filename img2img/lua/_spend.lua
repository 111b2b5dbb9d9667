-- What calls of pools that cost money came to, by pool, day (UTC) and account, in millionths.
-- It is reserved before a call may be made, so that caps hold however many jobs are under way. A job's `reserved` is for
-- a call that was not made yet, `charged` for one whose answer is awaited: "<pool> <day> <amount>". What is neither given back
-- nor taken over by a next call stays spent.

local DAY, SPEND_KEPT = 86400000, 35 * 86400000
local TODAY = math.floor(NOW / DAY)

local function add_spend(pool, day, account, amount)
  local key = P .. 'spend:' .. pool .. ':' .. day
  redis.call('HINCRBY', key, '*', amount)
  redis.call('HINCRBY', key, account, amount)
  redis.call('PEXPIRE', key, SPEND_KEPT)
end

local function is_affordable(pool, account)
  if not pool.price then return true end
  local spent = redis.call('HMGET', P .. 'spend:' .. pool.name .. ':' .. TODAY, '*', account)
  local function within(cap, sum) return not cap or (sum or 0) + pool.price <= cap end
  return within(pool.cap, spent[1]) and within(pool.tenant_cap, spent[2])
end

-- The reservation of one call's price; false where nothing is to be paid, nil where a cap is in the way.
local function reserve(pool, account)
  if not pool.price then return false end
  if not is_affordable(pool, account) then return nil end
  add_spend(pool.name, TODAY, account, int(pool.price))
  return pool.name .. ' ' .. TODAY .. ' ' .. int(pool.price)
end

local function refund(account, reservation)
  if not reservation then return end
  local pool, day, amount = string.match(reservation, '^(%S+) (%S+) (%S+)$')
  add_spend(pool, day, account, '-' .. amount)
end

local function pool_named(pools, name)
  for _, pool in ipairs(pools) do
    if pool.name == name then return pool end
  end
end

-- Pays for a call that is about to be made: with what was reserved today, or anew. False where a cap is in the way.
local function pay(id)
  local job = redis.call('HMGET', job_key(id), 'pools', 'queue', 'account', 'reserved')
  local pool = job[1] and pool_named(cjson.decode(job[1]), job[2])
  if not (pool and pool.price) then return true end
  local reservation = job[4]
  if reservation and string.match(reservation, ' (%S+) ') ~= tostring(TODAY) then
    refund(job[3], reservation)
    redis.call('HDEL', job_key(id), 'reserved')
    reservation = nil
  end
  reservation = reservation or reserve(pool, job[3])
  if not reservation then return false end
  redis.call('HSET', job_key(id), 'charged', reservation)
  redis.call('HDEL', job_key(id), 'reserved')
  return true
end

-- The last call cost nothing: what it would have cost serves the next one.
local function unpay(id)
  local charged = field(id, 'charged')
  if not charged then return end
  redis.call('HSET', job_key(id), 'reserved', charged)
  redis.call('HDEL', job_key(id), 'charged')
end

-- The answer where a cap is in the way, with the seconds until the next day: some more than that, to be within it.
local function unaffordable() return 'unaffordable ' .. decimal(((TODAY + 1) * DAY - NOW) / 1000 + 1) end
