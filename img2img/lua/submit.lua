-- Accepts a job, or answers with the one that this request joins. Running it twice changes nothing.
-- ARGV: queue, spec (JSON, stored as it is), order (JSON; times in ms):
--   id, account, fingerprint, lifetime, keep, boost, max_failures, max_crashes, reject_if_busy,
--   not_before (since 1970, or 0), own_deadline (whether `lifetime` was asked for),
--   max_queued, max_queued_account (0: no limit), refuse_late,
--   weight, size, pixels (0: the model's own), steps: what the work is and at whose expense
--   inputs: null | blob key, join: null | {key, mode = "idempotency" | "first" | "retry", ttl}, waiter: null | {id, ttl, grace}
--   horizon (the longest that any job of the account may be known)
-- Returns {'created'} | {'joined', id} | {'conflict'} | {'busy'}
--   | {'full' | 'full_account' | 'late', seconds until it is worth trying again, expected seconds to completion or ''}
local spec, order = ARGV[2], cjson.decode(ARGV[3])
local id, key, account = order.id, job_key(order.id), order.account
local join = order.join ~= cjson.null and order.join or nil
local waiter = order.waiter ~= cjson.null and order.waiter or nil
local join_key = join and P .. 'join:' .. OWN.name .. ':' .. join.key

local function joinable()
  if not join or join.mode == 'first' then return nil end
  local known = redis.call('HMGET', join_key, 'id', 'fingerprint')
  if not known[1] then return nil end
  local first = redis.call('HMGET', job_key(known[1]), 'state', 'stop')
  if not first[1] then return nil end
  -- A job that ends or has ended because nobody waited for it is no answer to somebody who does.
  if first[2] == 'disconnect' and first[1] ~= 'succeeded' then return nil end
  -- A retry asks for another try; an idempotency key asks for the first answer, whatever it was.
  local goes_on = not first[2] and (first[1] == 'queued' or first[1] == 'running')
  if join.mode == 'retry' and not goes_on and first[1] ~= 'succeeded' then return nil end
  return known
end

local function joined(known)
  if known[2] ~= order.fingerprint then return { 'conflict' } end
  if join.mode == 'retry' then redis.call('PEXPIRE', join_key, int(join.ttl)) end
  if not waiter then
    -- Who joins without waiting wants the job to go on when the others have left.
    redis.call('ZREM', OWN.abandon, known[1])
  elseif redis.call('ZSCORE', OWN.abandon, known[1]) then
    wait_for(known[1], waiter.id, waiter.ttl, waiter.grace)
  end
  return { 'joined', known[1] }
end

local score, since = int(NOW - order.boost), math.max(NOW, order.not_before)
-- A job that comes with a deadline of its own must be done by it; any other has its time from when it may start.
local expires = order.own_deadline and NOW + order.lifetime or since + order.lifetime
local totals = totals_of(OWN)
local measures = measures_of(OWN, totals.engine, order.size)
local area = relative_area(totals, order.pixels)

local seconds, measured = service_seconds(measures, order.steps, area)

local function expectation()
  if not measured or order.not_before > NOW then return nil end
  local ahead = totals.units and redis.call('ZCOUNT', ready_of(OWN, account), '-inf', score) or 0
  local wait = wait_for_slot(OWN, totals, account, work_before(OWN, totals, measures, account, ahead))
  return wait and completion(measures, wait, seconds)
end

local queued = redis.call('ZCARD', OWN.expiry)

local function refusal(expected)
  local mine = queued > 0 and order.max_queued_account > 0 and number_of(tenant_of(OWN, account), 'queued') or 0
  local full = order.max_queued > 0 and queued >= order.max_queued and 'full'
    or order.max_queued_account > 0 and mine >= order.max_queued_account and 'full_account'
  if full then
    local pause = expected and expected.expected / math.max(full == 'full' and queued or mine, 1) or 1
    return { full, decimal(math.min(math.max(pause, 1), 60)), expected and decimal(expected.p50) or '' }
  elseif order.refuse_late and expected and NOW + 1000 * expected.p10 > expires then
    return { 'late', decimal(math.min(math.max(expected.p10 - order.lifetime / 1000, 1), 600)), decimal(expected.p50) }
  end
end

local function is_busy()
  return (totals.slots or 0) - (queued - redis.call('ZCARD', OWN.delayed)) - redis.call('ZCARD', OWN.leases) <= 0
end

local function record(expected)
  local job = { account = account, score = score, units = int(1000 * order.steps * area), expires = int(expires),
    weight = decimal(order.weight) }
  local fields = { 'spec', spec, 'account', account, 'queue', OWN.name, 'state', 'queued', 'created', int(NOW),
    'since', int(since), 'expires', job.expires, 'score', score, 'boost', order.boost, 'keep', order.keep, 'attempt', '0',
    'max_failures', order.max_failures, 'max_crashes', order.max_crashes, 'size', order.size, 'steps', order.steps,
    'area', decimal(area), 'units', job.units, 'weight', job.weight }
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if order.inputs ~= cjson.null then add('inputs', order.inputs) end
  if expected then
    add('expected', decimal(expected.expected))
    add('bucket', expected.bucket)
  end
  redis.call('HSET', key, unpack(fields))
  return job
end

if redis.call('EXISTS', key) == 1 then return { 'created' } end
local known = joinable()
if known then return joined(known) end
if order.reject_if_busy and is_busy() then return { 'busy' } end
local expected = expectation()
local refused = refusal(expected)
if refused then return refused end

local ttl, arq = int(expires - NOW + order.keep), arq_id(id)
local job = record(expected)
if measured then note_inflow(OWN, totals, account, seconds) end
-- With nothing queued nobody has anything queued: a count that says otherwise lost track of a vanished record.
if queued == 0 then redis.call('DEL', tenant_of(OWN, account)) end
redis.call('PEXPIRE', key, ttl)
redis.call('SET', 'arq:job:' .. arq, arq_payload(id), 'PX', ttl)
redis.call('ZADD', OWN.alive, int(NOW), arq)
enqueue(OWN, id, job, since, '{}')
redis.call('PEXPIRE', P .. 'events:' .. id, ttl)

local mine = P .. 'account:' .. account
redis.call('ZADD', mine, int(NOW), id)
redis.call('ZREMRANGEBYSCORE', mine, '-inf', int(NOW - order.horizon))
redis.call('PEXPIRE', mine, int(order.horizon))

if join then
  redis.call('HSET', join_key, 'id', id, 'fingerprint', order.fingerprint)
  redis.call('PEXPIRE', join_key, int(join.ttl))
end
if waiter then wait_for(id, waiter.id, waiter.ttl, waiter.grace) end
return { 'created' }
