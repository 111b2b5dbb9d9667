"""What the server holds when all is over, read directly."""

import asyncio
import re
from typing import Any, Final

import msgspec

from img2img.jobs import JobEvent, JobState, Outcome
from worker.reports import UNRECORDED_SECONDS

PREFIX: Final = "img2img:{0}:"
JOB_ID: Final = re.compile(rb"\{?0\}?-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ALIVE: Final = "arq:queue:{0}:default"
QUARANTINE: Final = f"{PREFIX}quarantine:default"
DISCARDING: Final = f"{PREFIX}discarding"
NOT_OF_LIVING_JOBS: Final = (QUARANTINE, DISCARDING)
"""Blobs that a killed gateway was about to delete are told again after a minute."""
BLOB: Final = f"{PREFIX}blob:"
CHECKPOINT: Final = f"{BLOB}checkpoint:"
MEANWHILE: Final = frozenset({"progress", "preview"})
"""Events after which a job's state is what it was."""
OF_LIVING_JOBS: Final = ("arq:job:", "arq:in-progress:", f"{PREFIX}waiters:")
"""What must be gone when a job has ended."""


class Stored(msgspec.Struct):
    """One job: the fields of its record, its log, and arq's result."""

    id: str
    fields: dict[str, str]
    events: list[JobEvent]
    arq_result: bytes | None

    @property
    def state(self) -> JobState:
        return JobState(self.fields["state"])

    @property
    def outcome(self) -> Outcome | None:
        raw = self.fields.get("outcome")
        return None if raw is None else msgspec.json.decode(raw, type=Outcome)

    @property
    def prompt(self) -> str:
        return str(msgspec.json.decode(self.fields["spec"])["parameters"]["prompt"])

    @property
    def starts(self) -> list[JobEvent]:
        return [event for event in self.events if event.type == "running"]

    @property
    def history(self) -> list[Any]:
        """What the record says of attempts that came to nothing."""
        return list(msgspec.json.decode(self.fields.get("history", "[]")))

    def losses(self) -> list[str]:
        """The codes of all errors in the log."""
        return [str(error["code"]) for event in self.events if isinstance(error := event.data.get("error"), dict)]


class Snapshot(msgspec.Struct):
    jobs: dict[str, Stored]
    fence: int
    blobs: set[str]
    """Every stored file, those of fenced attempts included."""
    quarantine: set[str]
    leftovers: list[str]
    """What says that a job is alive although none is."""


async def read_snapshot(redis: Any) -> Snapshot:
    # Before the keys: a word is struck off when its blob is deleted.
    discarding = {member.decode().partition(" ")[2] for member in await redis.zrange(DISCARDING, 0, -1)}
    keys = [key async for key in redis.scan_iter(count=1000)]
    jobs: dict[str, Stored] = {}
    leftovers = []
    for key in keys:
        name = key.decode()
        if name.startswith(f"{PREFIX}job:"):
            job_id = name.removeprefix(f"{PREFIX}job:")
            jobs[job_id] = await _read_job(redis, job_id)
        elif name.startswith(CHECKPOINT):
            if name.removeprefix(BLOB) not in discarding and await redis.ttl(key) > UNRECORDED_SECONDS:
                leftovers.append(f"{name} is still there")
        elif name.startswith(OF_LIVING_JOBS):
            leftovers.append(f"{name} is still there")
        elif name not in NOT_OF_LIVING_JOBS and await redis.ttl(key) == -1:
            leftovers += [f"{name} still holds {member}" for member in await _job_ids_in(redis, key)]
            if JOB_ID.search(key):
                leftovers.append(f"{name} has no TTL")
    blobs = {key.decode().removeprefix(BLOB) for key in keys if key.startswith(BLOB.encode())}
    quarantine = {member.decode() for member in await redis.zrange(QUARANTINE, 0, -1)}
    return Snapshot(jobs, int(await redis.get(f"{PREFIX}fence") or 0), blobs, quarantine, leftovers)


async def _read_job(redis: Any, job_id: str) -> Stored:
    raw = await redis.hgetall(f"{PREFIX}job:{job_id}")
    log = await redis.lrange(f"{PREFIX}events:{job_id}", 0, -1)
    entries = (msgspec.json.decode(entry) for entry in log)
    events = [JobEvent(seq=number, **entry) for number, entry in enumerate(entries, 1)]
    arq_result = await redis.get("arq:result:{" + job_id.replace("-", "}-", 1))
    return Stored(job_id, {name.decode(): value.decode() for name, value in raw.items()}, events, arq_result)


async def _job_ids_in(redis: Any, key: bytes) -> list[str]:
    """The jobs that an index names, whatever its type."""
    match await redis.type(key):
        case b"zset":
            members = await redis.zrange(key, 0, -1)
        case b"set":
            members = list(await redis.smembers(key))
        case b"list":
            members = await redis.lrange(key, 0, -1)
        case b"hash":
            members = list(await redis.hkeys(key))
        case _:
            members = []
    return [member.decode() for member in members if JOB_ID.search(member)]


async def wait_until_idle(redis: Any, seconds: float) -> bool:
    """Whether every job came to its end, and every input that it leaves behind was deleted, within ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            while await redis.zcard(ALIVE) or await redis.llen(f"{PREFIX}discard"):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    except TimeoutError:
        return False
    return True
