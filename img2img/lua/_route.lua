-- Which pool a job goes to. `pools` is the list in its record, in order of preference: Candidates of queue_types.py.
-- A job of one pool that costs nothing has no such list, and stays where it is.

-- A pool that was given up is given another chance after this long, so that whoever scales it sees work for it.
local DEAD_RETRY = 300000
-- What waits longer than this for another try in its pool had better go elsewhere.
local LONGEST_PAUSE = 5000
local LOOK_AGAIN, MOVED_LATELY, SOONEST_LOOK = 5000, 2000, 1000
-- So many jobs at most are looked at in one go.
local LOOKS = 20
-- Added to the time at which a job was looked at while nobody worked in its pool: it comes after all others then.
local LOOKED_AT = 1e15
local FINE, LATE, PUT_OFF, DEAD = 0, 1, 2, 3

-- Milliseconds until a pool has a worker: 0 when it has one, nil when it counts as dead. And whether it was given up for so
-- long that whoever goes there or waits there gives it another chance.
local function start_of(pool, totals)
  if (totals.slots or 0) > 0 then return 0, false end
  -- The server's clock may have gone back, in a failover.
  local start, waited = pool.start or 0, math.max(0, NOW - (totals.unserved or NOW))
  local is_retried = waited > start + DEAD_RETRY
  if is_retried then waited = 0 end
  return waited < start and start - waited or nil, is_retried
end

local function give_chance(view)
  if view.is_retried then redis.call('HSET', view.queue.totals, 'unserved', int(NOW)) end
end

-- What a pool has to offer a job: {account, size, pixels, steps, score, since, ran}, of which `id` is queued there, if given.
local function outlook(pool, job, id)
  local queue = queue_named(pool.name)
  local totals = totals_of(queue)
  local measures = measures_of(queue, totals.engine, job.size)
  local view = { pool = pool, queue = queue, totals = totals, area = relative_area(totals, job.pixels) }
  view.seconds, view.measured = service_seconds(measures, job.steps, view.area)
  if job.since > NOW then
    view.start = 0  -- who works when a later start comes, nobody knows
    return view
  end
  view.start, view.is_retried = start_of(pool, totals)
  if not view.start then return view end
  local due = id and redis.call('ZSCORE', queue.delayed, id)
  if due then
    view.wait = math.max(0, due - NOW) / 1000
    view.is_put_off = due - NOW > LONGEST_PAUSE
  elseif view.start > 0 then
    view.wait = view.start / 1000
  else
    local ahead = id and redis.call('ZRANK', ready_of(queue, job.account), id)
      or totals.units and redis.call('ZCOUNT', ready_of(queue, job.account), '-inf', job.score) or 0
    local work, position = work_before(queue, totals, measures, job.account, ahead)
    view.is_free = position < totals.slots - redis.call('ZCARD', queue.leases)
    if view.measured or view.is_free then view.wait = wait_for_slot(queue, totals, job.account, work, position) end
  end
  view.expected = view.measured and view.wait and completion(measures, view.wait, view.seconds)
  return view
end

-- Milliseconds that are left until the job would be late in that pool; nil where nobody knows.
local function slack_of(view, job)
  local max_wait, slack = view.pool.max_wait, nil
  if max_wait and not view.is_free then
    slack = max_wait - math.max(0, NOW - job.since - (job.ran or 0)) - 1000 * (view.wait or 0)
  end
  if view.expected then
    slack = math.min(slack or math.huge, job.expires - NOW - 1000 * view.expected.p90)
  end
  return slack
end

-- How good a pool is for a job: nobody works there; it has put the job off; the job would start too late there, or hardly be
-- done in time; or it is fine.
local function rank_of(view, job)
  if not view.start then return DEAD end
  if view.is_put_off then return PUT_OFF end
  local slack = slack_of(view, job)
  return slack and slack < 0 and LATE or FINE
end

-- The best of the pools, the first of those that are as good, without those that `refuse` refuses; and what that said of
-- the first one it did.
local function best_of(pools, job, refuse)
  local best, refused
  for _, pool in ipairs(pools) do
    local view = outlook(pool, job)
    local no = refuse(pool, view)
    view.rank = not no and rank_of(view, job)
    if no then
      refused = refused or no
    elseif not best or view.rank < best.rank then
      best = view
      if view.rank == FINE then break end
    end
  end
  return best, refused
end

-- What is written on a job that goes to a pool: where it is, and the work that it is there.
local function assign(id, job, view)
  give_chance(view)
  job.units = int(1000 * job.steps * view.area)
  redis.call('HSET', job_key(id), 'queue', view.queue.name, 'area', decimal(view.area), 'units', job.units)
  local reservation = reserve(view.pool, job.account)
  if reservation then redis.call('HSET', job_key(id), 'reserved', reservation) end
end

-- A queued job of a record, in the form that `outlook` and `enqueue` take.
local function routed(id)
  local v = redis.call('HMGET', job_key(id), 'pools', 'account', 'size', 'pixels', 'steps', 'since', 'expires', 'score',
    'units', 'weight', 'crashes', 'reserved', 'ran')
  if not v[1] then return nil end
  return { pools = v[1], account = v[2], size = v[3], pixels = tonumber(v[4]), steps = tonumber(v[5]), since = tonumber(v[6]),
    expires = tonumber(v[7]), score = v[8], units = v[9], weight = v[10], crashes = v[11], reserved = v[12],
    ran = v[13] }
end

local WHY = { [FINE] = 'preferred', [LATE] = 'late', [PUT_OFF] = 'late', [DEAD] = 'no_workers' }

local function move(id, job, from, view, why)
  leave_waiting(id, from, job.account, job.units)
  refund(job.account, job.reserved)
  redis.call('HDEL', job_key(id), 'expected', 'bucket', 'reserved')
  assign(id, job, view)
  redis.call('ZREM', from.alive, arq_id(id))
  redis.call('ZADD', view.queue.alive, int(NOW), arq_id(id))
  local abandoned = redis.call('ZSCORE', from.abandon, id)
  if abandoned then
    redis.call('ZREM', from.abandon, id)
    redis.call('ZADD', view.queue.abandon, abandoned, id)
  end
  job.look = NOW + MOVED_LATELY
  enqueue(view.queue, id, job, NOW,
    cjson.encode({ pool = view.queue.name, moved = { from = from.name, why = why } }))
end

-- The pool to which a queued job had better go, if there is one: a better one than `here`, or one as fine that it prefers
-- and that would start it at once.
local function better_than(here, rank, pools, job)
  local is_preferred = true
  local best = best_of(pools, job, function(pool, view)
    if pool.name == here.pool.name then
      is_preferred = false
      return true
    end
    return (rank == FINE and not (is_preferred and view.is_free))
      or not is_affordable(pool, job.account)
      or ((pool.max_queued or 0) > 0 and redis.call('ZCARD', view.queue.expiry) >= pool.max_queued)
  end)
  return best and (best.rank < rank or best.rank == FINE) and best or nil
end

-- Moves a queued job, if it had better be elsewhere; if not, it answers when to look at it again.
local function reconsider(id, from)
  local job = routed(id)
  if not job then
    redis.call('ZREM', from.movable, id)
    return nil
  end
  if job.since > NOW then return job.since + SOONEST_LOOK end
  local pools = cjson.decode(job.pools)
  local here = outlook(pool_named(pools, from.name), job, id)
  give_chance(here)
  local rank = rank_of(here, job)
  local best = better_than(here, rank, pools, job)
  if best then
    move(id, job, from, best, WHY[rank])
    return nil
  end
  local slack = rank == FINE and (slack_of(here, job) or job.expires - NOW)
  return NOW + (slack and math.max(SOONEST_LOOK, slack / 2) or LOOK_AGAIN)
end

-- Moves jobs whose time to be looked at has come; all of them, a few at a time and in turn, when nobody works in their pool.
-- Answers whether others may be as due.
local function overflow(queue)
  local works, moved = number_of(queue.totals, 'slots') > 0, false
  local ids = redis.call('ZRANGEBYSCORE', queue.movable, '-inf', works and int(NOW) or '+inf', 'LIMIT', 0, LOOKS)
  if works and #ids < LOOKS then
    local left = redis.call('ZRANGEBYSCORE', queue.movable, int(LOOKED_AT), '+inf', 'LIMIT', 0, LOOKS - #ids)
    for _, id in ipairs(left) do ids[#ids + 1] = id end
  end
  for _, id in ipairs(ids) do
    local at = reconsider(id, queue)
    moved = moved or not at
    if at then redis.call('ZADD', queue.movable, 'XX', int(works and at or LOOKED_AT + NOW), id) end
  end
  return moved or (works and #ids == LOOKS)
end
