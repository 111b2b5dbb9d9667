-- Accepts a job, or answers with the one that this request joins. Running it twice changes nothing.
-- ARGV: queue, spec (JSON, stored as it is), order (JSON; times in ms):
--   id, account, fingerprint, lifetime, keep, boost, max_failures, max_crashes, reject_if_busy,
--   not_before (since 1970, or 0), own_deadline (whether `lifetime` was asked for),
--   pools (Candidates, the preferred one first), max_queued_account (0: no limit), refuse_late,
--   weight, size, pixels (0: the model's own), steps: what the work is and at whose expense
--   inputs: null | blob key, join: null | {key, mode = "idempotency" | "first" | "retry", ttl}, waiter: null | {id, ttl, grace}
--   horizon (the longest that any job of the account may be known)
-- Returns {'created', pool} | {'joined', id} | {'conflict'} | {'busy'}
--   | {'full' | 'full_account' | 'late' | 'spend', seconds until it is worth trying again, expected seconds to completion or ''}
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
    redis.call('ZREM', queue_named(field(known[1], 'queue')).abandon, known[1])
  elseif redis.call('ZSCORE', queue_named(field(known[1], 'queue')).abandon, known[1]) then
    wait_for(known[1], waiter.id, waiter.ttl, waiter.grace)
  end
  return { 'joined', known[1] }
end

local score, since = int(NOW - order.boost), math.max(NOW, order.not_before)
-- A job that comes with a deadline of its own must be done by it; any other has its time from when it may start.
local expires = order.own_deadline and NOW + order.lifetime or since + order.lifetime
local job = { account = account, score = score, since = since, expires = expires, size = order.size, pixels = order.pixels,
  steps = order.steps, weight = decimal(order.weight) }

local function is_full(pool, queue, queued)
  local mine = queued > 0 and order.max_queued_account > 0 and number_of(tenant_of(queue, account), 'queued') or 0
  if (pool.max_queued or 0) > 0 and queued >= pool.max_queued then return 'full', queued end
  if order.max_queued_account > 0 and mine >= order.max_queued_account then return 'full_account', mine end
end

local function is_busy(view, queued)
  local running = redis.call('ZCARD', view.queue.leases)
  return (view.totals.slots or 0) - (queued - redis.call('ZCARD', view.queue.delayed)) - running <= 0
end

-- Why a pool does not take the job, as this script answers it.
local function refusal(pool, view)
  local queued, expected = redis.call('ZCARD', view.queue.expiry), view.expected
  if order.reject_if_busy and is_busy(view, queued) then return { 'busy' } end
  local full, count = is_full(pool, view.queue, queued)
  if full then
    local pause = expected and expected.expected / math.max(count, 1) or 1
    return { full, decimal(math.min(math.max(pause, 1), 60)), expected and decimal(expected.p50) or '' }
  elseif order.refuse_late and expected and NOW + 1000 * expected.p10 > expires then
    return { 'late', decimal(math.min(math.max(expected.p10 - order.lifetime / 1000, 1), 600)), decimal(expected.p50) }
  elseif not is_affordable(pool, account) then
    return { 'spend', decimal(((TODAY + 1) * DAY - NOW) / 1000), '' }
  end
end

-- Whether the job is bound to its pool: then it needs no list of others, and no account of money.
local function is_bound() return #order.pools == 1 and not order.pools[1].price end

local function record(view)
  local fields = { 'spec', spec, 'account', account, 'state', 'queued', 'created', int(NOW),
    'since', int(since), 'expires', int(expires), 'score', score, 'boost', order.boost, 'keep', order.keep, 'attempt', '0',
    'max_failures', order.max_failures, 'max_crashes', order.max_crashes, 'size', order.size, 'steps', order.steps,
    'pixels', order.pixels, 'weight', job.weight }
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if order.inputs ~= cjson.null then add('inputs', order.inputs) end
  if not is_bound() then
    job.pools = cjson.encode(order.pools)
    add('pools', job.pools)
  end
  if view.expected then
    add('expected', decimal(view.expected.expected))
    add('bucket', view.expected.bucket)
  end
  redis.call('HSET', key, unpack(fields))
end

if redis.call('EXISTS', key) == 1 then return { 'created', field(id, 'queue') } end
local known = joinable()
if known then return joined(known) end
local choice, refused = best_of(order.pools, job, refusal)
if not choice then return refused end

local ttl, arq, queue = int(expires - NOW + order.keep), arq_id(id), choice.queue
record(choice)
assign(id, job, choice)
if choice.measured then note_inflow(queue, choice.totals, account, choice.seconds) end
-- With nothing queued nobody has anything queued: a count that says otherwise lost track of a vanished record.
if redis.call('EXISTS', queue.expiry) == 0 then redis.call('DEL', tenant_of(queue, account)) end
redis.call('PEXPIRE', key, ttl)
redis.call('SET', 'arq:job:' .. arq, arq_payload(id), 'PX', ttl)
redis.call('ZADD', queue.alive, int(NOW), arq)
local slack = job.pools and slack_of(choice, job)
job.look = math.max(since, NOW) + math.max(SOONEST_LOOK, (slack or 0) / 2)
job.expires = int(expires)
enqueue(queue, id, job, since, '{}')
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
return { 'created', queue.name }
