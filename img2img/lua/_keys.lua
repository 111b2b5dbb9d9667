-- What every script shares: keys, the clock, the event log. The parts that begin with `_` are put in front of each
-- script in the order that lua/__init__.py names. Keys: docs/queue.md.
-- KEYS[1] is the shard's prefix "img2img:{<shard>}:", ARGV[1] the queue's name. Every key lies in that slot.
-- Only the server's clock counts: TIME is read here, never sent by a client. Times are milliseconds since 1970.

local P, QUEUE = KEYS[1], ARGV[1]
local SHARD = string.match(P, '{.-}')
local DISCARD = P .. 'discard'
local WAKE_CAP = 512

local TIME = redis.call('TIME')
local NOW = TIME[1] * 1000 + math.floor(TIME[2] / 1000)

-- The keys of a queue. A job's own queue counts, whichever queue a caller looks at.
local function keys_of(queue)
  return {
    ready = P .. 'ready:' .. queue .. ':', tenants = P .. 'tenants:' .. queue, rested = P .. 'rested:' .. queue,
    tenant = P .. 'tenant:' .. queue .. ':', totals = P .. 'totals:' .. queue, service = P .. 'service:' .. queue .. ':',
    suspects = P .. 'suspects:' .. queue, isolating = P .. 'isolating:' .. queue,
    delayed = P .. 'delayed:' .. queue, leases = P .. 'leases:' .. queue, expiry = P .. 'expiry:' .. queue,
    abandon = P .. 'abandon:' .. queue, quarantine = P .. 'quarantine:' .. queue, wake = P .. 'wake:' .. queue,
    workers = P .. 'workers:' .. queue, worker_info = P .. 'worker-info:' .. queue, slots = P .. 'slots:' .. queue,
    stall = P .. 'stall:' .. queue, alive = 'arq:queue:' .. SHARD .. ':' .. queue,
  }
end

local OWN = keys_of(QUEUE)

local function int(number) return string.format('%.0f', number) end

local function decimal(number) return string.format('%.12g', number) end

local function number_of(key, name) return tonumber(redis.call('HGET', key, name) or 0) end

local function add_to(key, name, amount) redis.call('HINCRBYFLOAT', key, name, decimal(amount)) end

local function job_key(id) return P .. 'job:' .. id end

-- arq's id of a job carries the hash tag, so that arq's own keys fall into the same slot.
local function arq_id(id) return (string.gsub(id, '^(%d+)', '{%1}')) end

local function field(id, name) return redis.call('HGET', job_key(id), name) end

local function keys_of_job(id)
  local queue = field(id, 'queue')
  return (queue and queue ~= QUEUE) and keys_of(queue) or OWN
end

local function emit(id, kind, data)
  local seq = redis.call('HINCRBY', job_key(id), 'seq', 1)
  redis.call('XADD', P .. 'events:' .. id, seq .. '-0', 'type', kind, 'at', int(NOW), 'data', data)
  redis.call('PUBLISH', P .. 'bell:' .. id, seq)
end

local function wake(queue)
  redis.call('RPUSH', queue.wake, '1')
  redis.call('LTRIM', queue.wake, -WAKE_CAP, -1)
end
