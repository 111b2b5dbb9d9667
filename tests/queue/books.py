"""What a queue's keys say of each other: read in one go, checked against the jobs' records, and made older."""

import json
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any, Final

from arq.connections import ArqRedis

KEEP: Final = 1000.0
"""Seconds for which records are kept: longer than any time that passes here without a sweep."""
PREFIX: Final = "img2img:{0}:"
ALIVE: Final = "arq:queue:{0}:"
WAITING: Final = ("delayed", "suspects", "ready")
TAKE_NO_PART: Final = ("progress", "preview")
FOLLOWERS: Final = {
    "queued": {"running", "queued", "canceled", "expired"},
    "running": {"queued", "succeeded", "failed", "canceled", "expired"},
    "failed": {"queued"},
    "canceled": {"queued"},
    "expired": {"queued"},
    "succeeded": set[str](),
}
"""Which event may come after which in a job's log."""

READ_ALL: Final = """
local all = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, value = redis.call('TYPE', key).ok, nil
  if kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'hash' then value = redis.call('HGETALL', key)
  elseif kind == 'list' then value = redis.call('LRANGE', key, 0, -1)
  elseif kind == 'set' then value = redis.call('SMEMBERS', key)
  else value = redis.call('GET', key) end
  all[#all + 1] = { key, kind, redis.call('PTTL', key), value }
end
return all
"""
AGE_ALL: Final = """
local ms, swept = tonumber(ARGV[1]), ARGV[2] == '1'
local times = {
  abandon = 1, account = 1, delayed = 1, discarding = 1, expiry = 1, leases = 1, movable = 1, quarantine = 1, ready = 1,
  startable = 1, suspects = 1, waiters = 1, workers = 1,
}
local fields = {
  job = { 'created', 'since', 'expires', 'score', 'started', 'finished' },
  totals = { 'unserved', 'inflow_at' },
  stall = swept and { 'from', 'to' } or { 'last', 'from', 'to' },
}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, name = string.match(key, '^img2img:{0}:([^:]+):?([^:]*)')
  if times[kind] then
    for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do redis.call('ZINCRBY', key, -ms, member) end
  end
  for _, field in ipairs(fields[kind] or {}) do
    if redis.call('HEXISTS', key, field) == 1 then redis.call('HINCRBY', key, field, -ms) end
  end
  local running = kind == 'totals' and redis.call('ZCARD', 'img2img:{0}:leases:' .. name) or 0
  if running > 0 then redis.call('HINCRBY', key, 'running_since', -ms * running) end
  local left = redis.call('PTTL', key)
  if left > ms then redis.call('PEXPIRE', key, left - ms) elseif left > 0 then redis.call('DEL', key) end
end
"""
END_DAY: Final = """
local spent = redis.call('KEYS', 'img2img:{0}:spend:*')
table.sort(spent)
for _, key in ipairs(spent) do
  local start, day = string.match(key, '^(.*:)(%d+)$')
  redis.call('RENAME', key, start .. string.format('%.0f', day - 1))
end
for _, key in ipairs(redis.call('KEYS', 'img2img:{0}:job:*')) do
  for _, field in ipairs({ 'reserved', 'charged' }) do
    local pool, day, amount = string.match(redis.call('HGET', key, field) or '', '^(%S+) (%S+) (%S+)$')
    if pool then redis.call('HSET', key, field, pool .. ' ' .. string.format('%.0f', day - 1) .. ' ' .. amount) end
  end
end
"""


async def age(redis: ArqRedis, ms: int, *, swept: bool = True) -> None:
    """Have so much time pass; unless somebody ``swept`` meanwhile, as if the server had been away."""
    await redis.eval(AGE_ALL, 0, str(ms), str(int(swept)))  # type: ignore[misc]


async def end_day(redis: ArqRedis) -> None:
    """Have what was spent today have been spent yesterday."""
    await redis.eval(END_DAY, 0)  # type: ignore[misc]


class Snapshot:
    """All keys of a server at one moment; ``jobs`` are the records by id."""

    def __init__(self, found: list[list[Any]]) -> None:
        self.keys = {key.decode(): _decoded(kind.decode(), value) for key, kind, _, value in found}
        self.ttls = {key.decode(): int(ttl) for key, _, ttl, _ in found}
        start = f"{PREFIX}job:"
        self.jobs: dict[str, dict[str, str]] = {
            key.removeprefix(start): value for key, value in self.keys.items() if key.startswith(start)
        }

    @classmethod
    async def take(cls, redis: ArqRedis) -> "Snapshot":
        return cls(await redis.eval(READ_ALL, 0))  # type: ignore[misc]

    def of(self, kind: str, *names: str) -> dict[str, Any]:
        """A sorted set or hash of a queue, or of a queue and an account."""
        found: dict[str, Any] = self.keys.get(":".join((f"{PREFIX}{kind}", *names)), {})
        return found

    def check(self, pools: tuple[str, ...], accounts: tuple[str, ...]) -> None:
        """Every job is where its state says and nowhere else, and every sum is right."""
        places = self._places(pools, accounts)
        assert places.keys() <= self.jobs.keys()
        for job_id, job in self.jobs.items():
            self._check_job(job_id, job, places.get(job_id, set()))
            self._check_log(job_id, job)
        for pool in pools:
            self._check_totals(pool)
            for account in accounts:
                self._check_account(pool, account)

    def _places(self, pools: tuple[str, ...], accounts: tuple[str, ...]) -> dict[str, set[tuple[str, str]]]:
        """Of each job in an index the indexes that have it: kind and pool."""
        places = defaultdict(set)
        for pool in pools:
            for kind in ("abandon", "delayed", "expiry", "leases", "movable", "startable", "suspects"):
                for job_id in self.of(kind, pool):
                    places[job_id].add((kind, pool))
            for account in accounts:
                for job_id in self.of("ready", pool, account):
                    assert self.jobs[job_id]["account"] == account
                    places[job_id].add(("ready", pool))
            for arq_id in self.keys.get(f"{ALIVE}{pool}", {}):
                places["0" + arq_id.removeprefix("{0}")].add(("alive", pool))
        return places

    def _check_job(self, job_id: str, job: dict[str, str], places: set[tuple[str, str]]) -> None:
        state, arq_id = job["state"], "{0}" + job_id[1:]
        kinds = sorted(kind for kind, pool in places if kind != "abandon")
        assert {pool for _, pool in places} <= {job["queue"]}
        if state == "queued":
            (how,) = (kind for kind in kinds if kind in WAITING)
            more = [*(["movable"] if "pools" in job else []), *(["startable"] if how != "delayed" else [])]
            assert kinds == sorted(["alive", "expiry", how, *more])
            assert self.of("expiry", job["queue"])[job_id] == float(job["expires"])
            assert not job.keys() & {"fence", "sent", "charged"}
            assert how == "delayed" or (how == "suspects") == ("crashes" in job)
        elif state == "running":
            assert kinds == ["alive", "leases"]
        else:
            assert not places
            assert "reserved" not in job
            assert 0 < self.ttls[f"{PREFIX}job:{job_id}"] <= 1000 * KEEP
        has_ended = state not in ("queued", "running")
        assert (f"arq:job:{arq_id}" in self.keys, f"arq:result:{arq_id}" in self.keys) == (not has_ended, has_ended)
        assert ("quarantined" in job) == (job_id in self.of("quarantine", job["queue"]))

    def _check_log(self, job_id: str, job: dict[str, str]) -> None:
        events = [json.loads(event) for event in self.keys[f"{PREFIX}events:{job_id}"]]
        states = [event["type"] for event in events if event["type"] not in TAKE_NO_PART]
        assert (states[0], states[-1]) == ("queued", job["state"])
        assert all(later in FOLLOWERS[state] for state, later in pairwise(states))
        pictures = sum("image" in event["data"] for event in events)
        assert pictures <= (job["state"] == "running")

    def _in(self, pool: str, state: str) -> list[dict[str, str]]:
        return [job for job in self.jobs.values() if (job["queue"], job["state"]) == (pool, state)]

    def _units(self, pool: str, account: str) -> int:
        return sum(int(self.jobs[job_id]["units"]) for job_id in self.of("ready", pool, account))

    def _check_totals(self, pool: str) -> None:
        totals, running = self.of("totals", pool), self._in(pool, "running")
        numbers = {name: int(totals.get(name, 0)) for name in ("units", "running_ms", "running_since", "slots")}
        accounts = {job["account"] for job in self._in(pool, "queued")}
        assert numbers == {
            "units": sum(self._units(pool, account) for account in accounts),
            "running_ms": sum(int(job["ms"]) for job in running),
            "running_since": sum(int(job["started"]) for job in running),
            "slots": sum(int(slots) for slots in self.of("slots", pool).values()),
        }
        assert self.of("slots", pool).keys() <= self.of("workers", pool).keys()
        assert self.of("worker-info", pool).keys() == self.of("workers", pool).keys()
        assert not ("unserved" in totals and numbers["slots"])

    def _check_account(self, pool: str, account: str) -> None:
        tenant, ready = self.of("tenant", pool, account), self.of("ready", pool, account)
        assert int(tenant.get("queued", 0)) == sum(job["account"] == account for job in self._in(pool, "queued"))
        assert int(tenant.get("units", 0)) == self._units(pool, account)
        assert (account in self.of("tenants", pool)) == bool(ready)
        assert not (account in self.of("rested", pool) and ready)

    def spent(self) -> dict[tuple[str, str], Counter[str]]:
        """What was spent, by pool and day, of each account; the sum over all of them is right."""
        books = {}
        for key, amounts in self.keys.items():
            if key.startswith(f"{PREFIX}spend:"):
                counted = Counter({account: int(amount) for account, amount in amounts.items()})
                every = counted.pop("*")
                assert every == counted.total()
                assert min(counted.values()) >= 0
                pool, day = key.removeprefix(f"{PREFIX}spend:").split(":")
                books[pool, day] = counted
        return books


def _decoded(kind: str, value: Any) -> Any:
    if kind == "string":
        return value.decode(errors="replace")
    texts = [item.decode(errors="replace") for item in value]
    if kind == "zset":
        return {member: float(score) for member, score in zip(texts[::2], texts[1::2], strict=True)}
    return dict(zip(texts[::2], texts[1::2], strict=True)) if kind == "hash" else texts
