-- What every script shares: keys, the clock, the event log. The parts that begin with `_` are put in front of each
-- script in the order that lua/__init__.py names. Keys: docs/queue.md.
-- KEYS[1] is the shard's prefix "img2img:{<shard>}:", ARGV[1] the queue's name. Every key lies in that slot.
-- Only the server's clock counts: TIME is read here, never sent by a client. Times are milliseconds since 1970.

local P = KEYS[1]
local DISCARD, DISCARDING, QUEUES = P .. 'discard', P .. 'discarding', P .. 'queues'
local WAKE_CAP = 512

local TIME = redis.call('TIME')
local NOW = TIME[1] * 1000 + math.floor(TIME[2] / 1000)

-- The keys of a queue, `queue.leases` and so on, each made when it is first asked for.
local function keys_of(name)
  local keys = { name = name, alive = 'arq:queue:' .. string.match(P, '{.-}') .. ':' .. name }
  return setmetatable(keys, {
    __index = function(self, kind)
      local key = P .. kind .. ':' .. name
      rawset(self, kind, key)
      return key
    end,
  })
end

local OWN = keys_of(ARGV[1])

-- A job's own queue counts, whichever queue a caller looks at.
local function queue_named(name)
  return (name and name ~= OWN.name) and keys_of(name) or OWN
end

local function ready_of(queue, account) return queue.ready .. ':' .. account end

local function tenant_of(queue, account) return queue.tenant .. ':' .. account end

local function int(number) return string.format('%.0f', number) end

local function decimal(number) return string.format('%.12g', number) end

local function exact(number) return string.format('%.17g', number) end

local function number_of(key, name) return tonumber(redis.call('HGET', key, name) or 0) end

local function job_key(id) return P .. 'job:' .. id end

-- arq's id of a job carries the hash tag, so that arq's own keys fall into the same slot.
local function arq_id(id) return (string.gsub(id, '^(%d+)', '{%1}')) end

local function field(id, name) return redis.call('HGET', job_key(id), name) end

-- An entry of a job's log; `data` is JSON.
local function event_text(kind, data) return '{"type":"' .. kind .. '","at":' .. int(NOW) .. ',"data":' .. data .. '}' end

-- Appends to the job's log, where an event's number is its place; answers with that.
local function emit(id, kind, data)
  local number = redis.call('RPUSH', P .. 'events:' .. id, event_text(kind, data))
  -- Whoever begins to follow a job reads its log first: nobody needs a bell for the first event.
  if number > 1 then redis.call('PUBLISH', P .. 'bell:' .. id, number) end
  return number
end

local function wake(queue)
  if redis.call('RPUSH', queue.wake, '1') > WAKE_CAP then redis.call('LTRIM', queue.wake, -WAKE_CAP, -1) end
end
