-- Accepts a job, or answers with the one that this request joins. Running it twice changes nothing.
-- ARGV: queue, spec (JSON, stored as it is), order (JSON):
--   id, account, fingerprint, lifetime, keep, boost, attempts, reject_if_busy,
--   inputs: null | blob key, join: null | {key, mode = "idempotency" | "first" | "retry", ttl}, waiter: null | {id, ttl, grace}
--   horizon (the longest that any job of the account may be known; times in ms)
-- Returns {'created'} | {'joined', id} | {'conflict'} | {'busy'}
local spec, order = ARGV[2], cjson.decode(ARGV[3])
local id, key, arq = order.id, job_key(order.id), arq_id(order.id)
local join = order.join ~= cjson.null and order.join or nil
local waiter = order.waiter ~= cjson.null and order.waiter or nil
local join_key = join and P .. 'join:' .. QUEUE .. ':' .. join.key

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

local function free_slots()
  local slots = 0
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, int(NOW), '+inf')) do
    slots = slots + cjson.decode(redis.call('HGET', WORKER_INFO, worker)).slots
  end
  return slots - redis.call('ZCARD', OWN.ready) - redis.call('ZCARD', OWN.delayed) - redis.call('ZCARD', OWN.leases)
end

if redis.call('EXISTS', key) == 1 then return { 'created' } end
local known = joinable()
if known then
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
if order.reject_if_busy and free_slots() <= 0 then return { 'busy' } end

local ttl = int(order.lifetime + order.keep)
local score, expires = int(NOW - order.boost), int(NOW + order.lifetime)
redis.call('HSET', key, 'spec', spec, 'account', order.account, 'queue', QUEUE, 'state', 'queued', 'created', int(NOW),
  'expires', expires, 'score', score, 'keep', int(order.keep), 'attempts', order.attempts, 'attempt', 0)
if order.inputs ~= cjson.null then redis.call('HSET', key, 'inputs', order.inputs) end
redis.call('PEXPIRE', key, ttl)
local payload = cjson.encode({ t = cjson.null, f = 'generate', a = { id }, k = {}, et = NOW })
redis.call('SET', 'arq:job:' .. arq, payload, 'PX', ttl)
redis.call('ZADD', OWN.alive, int(NOW), arq)
redis.call('ZADD', OWN.ready, score, id)
redis.call('ZADD', OWN.expiry, expires, id)
emit(id, 'queued', '{}')
redis.call('PEXPIRE', P .. 'events:' .. id, ttl)

local mine = P .. 'account:' .. order.account
redis.call('ZADD', mine, int(NOW), id)
redis.call('ZREMRANGEBYSCORE', mine, '-inf', int(NOW - order.horizon))
redis.call('PEXPIRE', mine, int(order.horizon))

if join then
  redis.call('HSET', join_key, 'id', id, 'fingerprint', order.fingerprint)
  redis.call('PEXPIRE', join_key, int(join.ttl))
end
if waiter then wait_for(id, waiter.id, waiter.ttl, waiter.grace) end
wake(OWN)
return { 'created' }
