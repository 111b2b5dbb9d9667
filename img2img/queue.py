"""The job queue: arq's formats on Redis, our own claim, lease and fence. Keys and scripts: docs/queue.md.

A job is accepted, claimed, reported on and ended by one Lua script each, so that a crash between two commands
cannot leave half a change. arq's payload, its queue's sorted set and its result key are kept up to date:
``arq.jobs.Job`` answers for our jobs too.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
import uuid_utils
from arq.connections import ArqRedis

from img2img import lua
from img2img.errors import IdempotencyConflict, JobNotFound, LeaseLost, NoCapacity
from img2img.jobs import Failure, Job, JobSpec, JobState, Outcome, Running, StopReason
from img2img.server import milliseconds, translated

SHARD: Final = 0
SCRIPTS: Final = (
    "submit", "claim", "beat", "report", "finish", "release", "cancel", "wait", "leave", "sweep",
)  # fmt: skip
JOB_FIELDS: Final = (
    "spec", "account", "state", "created", "expires", "attempt", "started", "finished", "running", "outcome", "stop",
)  # fmt: skip
LIST_SCAN: Final = 500


class Join(msgspec.Struct, frozen=True):
    """How a request finds the job of an equal one: by idempotency key, or as a retried call (ttl in ms)."""

    key: str
    mode: Literal["idempotency", "first", "retry"]
    ttl: int


class Waiter(msgspec.Struct, frozen=True):
    """A caller whose going away ends the job: renewed within ``ttl``, forgiven for ``grace`` (both ms)."""

    id: str
    ttl: int
    grace: int


class Lifetime(msgspec.Struct, frozen=True):
    """How long a job may live until it ends, and how long its record is kept after (seconds).

    ``longest`` is how long any job may live, for what belongs to more than one job.
    """

    seconds: float
    keep: float
    longest: float = 24 * 3600.0


class Submitted(msgspec.Struct, frozen=True):
    """The job that answers a submission; ``created`` is false when it joined an earlier one."""

    id: str
    created: bool


class Claim(msgspec.Struct, frozen=True):
    """A worker's hold on a job: every write of this attempt carries ``fence``. Times in ms since 1970."""

    id: str
    fence: int
    attempt: int
    spec: JobSpec
    created_at: int
    expires_at: int
    claimed_at: int


class WorkerInfo(msgspec.Struct, frozen=True):
    """What a worker says of itself; ``slots`` is how many jobs it runs at once."""

    id: str
    slots: int
    engine: str
    model: str
    device: str


class QueueStats(msgspec.Struct, frozen=True):
    """Counts at one moment."""

    queued: int
    delayed: int
    running: int
    workers: tuple[WorkerInfo, ...]


class Page(msgspec.Struct, frozen=True):
    """One page of a list; ``next`` is the cursor of the following one, None on the last."""

    jobs: tuple[Job, ...]
    next: str | None


class JobQueue:
    """One queue of one shard. Every method raises ``Unavailable`` when the server cannot be reached."""

    def __init__(
        self, redis: ArqRedis, name: str = "default", *, attempts: int = 3, priority_seconds: float = 30.0
    ) -> None:
        self.redis = redis
        self.name = name
        self.prefix = f"img2img:{{{SHARD}}}:"
        self.alive_key = f"arq:queue:{{{SHARD}}}:{name}"
        self.wake_key = f"{self.prefix}wake:{name}"
        self._attempts = attempts
        self._priority_seconds = priority_seconds
        self._scripts = {script: redis.register_script(lua.source(script)) for script in SCRIPTS}

    @staticmethod
    def new_id() -> str:
        """A fresh public id, ``<shard>-<uuid7>``; ids sort by the time they were made."""
        return f"{SHARD}-{uuid_utils.uuid7()}"

    def bell(self, job_id: str) -> str:
        """The channel that rings when a job's log has grown."""
        return f"{self.prefix}bell:{job_id}"

    def events_key(self, job_id: str) -> str:
        return f"{self.prefix}events:{job_id}"

    async def submit(
        self, spec: JobSpec, lifetime: Lifetime, *, join: Join | None = None, waiter: Waiter | None = None
    ) -> Submitted:
        """Accept a job, or find the one it joins. Safe to repeat with the same id.

        Raises:
            IdempotencyConflict: the join key belongs to another request.
            NoCapacity: ``reject_if_busy`` was asked for and no worker is free.
        """
        order = {
            "id": spec.id,
            "account": spec.account,
            "fingerprint": spec.fingerprint,
            "lifetime": milliseconds(lifetime.seconds),
            "keep": milliseconds(lifetime.keep),
            "horizon": milliseconds(max(lifetime.longest, lifetime.seconds) + lifetime.keep),
            "boost": milliseconds(spec.options.priority * self._priority_seconds),
            "attempts": self._attempts,
            "reject_if_busy": spec.options.reject_if_busy,
            "inputs": spec.inputs,
            "join": join,
            "waiter": waiter,
        }
        answer = await self._run("submit", msgspec.json.encode(spec), msgspec.json.encode(order))
        match [part.decode() for part in answer]:
            case ["joined", job_id]:
                return Submitted(job_id, created=False)
            case ["conflict"]:
                raise IdempotencyConflict
            case ["busy"]:
                raise NoCapacity("Every worker is busy: try again, or send the request without rejectIfBusy")
        return Submitted(spec.id, created=True)

    async def get(self, job_id: str, account: str | None = None) -> Job:
        """The job as it stands; with ``account``, only if it is that account's.

        Raises:
            JobNotFound: there is none, it is another account's, or its record has expired.
        """
        with translated():
            async with self.redis.pipeline(transaction=False) as pipe:
                pipe.hmget(self._job_key(job_id), list(JOB_FIELDS))
                pipe.zrank(f"{self.prefix}ready:{self.name}", job_id)
                fields, rank = await pipe.execute()
        if fields[0] is None or (account is not None and fields[1] != account.encode()):
            raise JobNotFound(job_id)
        return _job(fields, rank)

    async def list_jobs(
        self, account: str, *, state: JobState | None = None, cursor: str | None = None, limit: int = 20
    ) -> Page:
        """The account's jobs, newest first; looks at a bounded number of jobs, so a page can be short."""
        index, start = f"{self.prefix}account:{account}", 0
        found: list[Job] = []
        ids: list[str] = []
        with translated():
            if cursor is not None:
                rank = await self.redis.zrevrank(index, cursor)
                if rank is None:  # trimmed since: everything after it has gone before it
                    return Page((), None)
                start = rank + 1
            for offset in range(start, start + LIST_SCAN, limit):
                ids = [raw.decode() for raw in await self.redis.zrevrange(index, offset, offset + limit - 1)]
                for job in await self._load(ids):
                    if state is None or job.state == state:
                        found.append(job)
                        if len(found) == limit:
                            return Page(tuple(found), job.id)
                if len(ids) < limit:
                    return Page(tuple(found), None)
        return Page(tuple(found), ids[-1])

    async def claim(self, worker: str, count: int, lease: float, token: str) -> tuple[list[Claim], float | None]:
        """Take up to ``count`` jobs; also says in how many seconds the queue needs looking at again.

        Until it has answered, repeat it with the same ``token``: it then hands out the same jobs again.
        """
        due, *claims = await self._run("claim", worker, count, milliseconds(lease), token)
        return [_claim(raw) for raw in claims], None if due < 0 else due / 1000

    async def beat(
        self, worker: WorkerInfo, claims: Sequence[Claim], *, lease: float, ttl: float
    ) -> dict[int, StopReason]:
        """Keep the worker known and its claims alive; answers which must stop, by their fence, and why."""
        held = [value for claim in claims for value in (claim.id, claim.fence)]
        info = msgspec.json.encode(worker)
        answers = await self._run("beat", worker.id, milliseconds(ttl), info, milliseconds(lease), *held)
        told = zip(claims, answers, strict=True)
        return {claim.fence: _stop_reason(answer) for claim, answer in told if answer != b"ok"}

    async def wait_for_work(self, timeout: float) -> None:
        """Sleep until a job is submitted, or ``timeout`` seconds; a lost ring costs no more than that."""
        await self._pop(self.wake_key, timeout)

    async def next_stop(self, worker: str, timeout: float) -> tuple[str, StopReason] | None:
        """The next job that this worker is told to stop, and why; None after ``timeout`` seconds."""
        message = await self._pop(self._control_key(worker), timeout)
        if message is None:
            return None
        job_id, _, reason = message.partition(" ")
        return job_id, StopReason(reason)

    async def sign_off(self, worker: str) -> None:
        """Forget a worker that holds nothing, and ring once for the token that it may have taken."""
        with translated():
            async with self.redis.pipeline(transaction=False) as pipe:
                pipe.zrem(f"{self.prefix}workers:{self.name}", worker)
                pipe.hdel(f"{self.prefix}worker-info:{self.name}", worker)
                pipe.delete(self._control_key(worker))
                pipe.rpush(self.wake_key, "1")
                await pipe.execute()

    async def report(self, claim: Claim, running: Running) -> StopReason | None:
        """Record progress; answers with the reason if the job should stop."""
        answer = await self._run("report", claim.id, claim.fence, msgspec.json.encode(running))
        return None if answer == b"ok" else _stop_reason(answer)

    async def finish(self, claim: Claim, outcome: Outcome) -> None:
        """End the job: record, terminal event and arq's result in one step. Safe to repeat.

        Raises:
            LeaseLost: somebody else holds the job now; nothing was written.
        """
        done = await self._run("finish", claim.id, claim.fence, outcome.state.value, msgspec.json.encode(outcome))
        if not done:
            raise LeaseLost(f"Job {claim.id} is no longer held under fence {claim.fence}")

    async def release(self, claim: Claim, why: Failure, *, spent: bool, delay: float = 0.0) -> None:
        """Give the job back for another attempt; ``spent`` counts this one against the limit.

        Raises:
            LeaseLost: somebody else holds the job now; nothing was written.
        """
        flag = "1" if spent else ""
        done = await self._run("release", claim.id, claim.fence, flag, milliseconds(delay), why.code, why.message)
        if not done:
            raise LeaseLost(f"Job {claim.id} is no longer held under fence {claim.fence}")

    async def cancel(self, job_id: str, reason: StopReason = StopReason.USER) -> JobState:
        """Ask a job to stop, in any state and as often as wanted; a queued one ends at once.

        Raises:
            JobNotFound: there is none.
        """
        state = await self._run("cancel", job_id, reason.value)
        if state is None:
            raise JobNotFound(job_id)
        return JobState(state.decode())

    async def wait_for(self, job_id: str, waiter: Waiter) -> None:
        """Renew a waiter's interest in a job that ends when nobody waits for it."""
        await self._run("wait", job_id, waiter.id, waiter.ttl, waiter.grace)

    async def leave(self, job_id: str, waiter: Waiter) -> None:
        """A waiter goes; the last one starts the grace period."""
        await self._run("leave", job_id, waiter.id, waiter.grace)

    async def sweep(self) -> tuple[list[str], float | None]:
        """End what is overdue; answers which input blobs may go, and in how many seconds there is more to do."""
        due, *discarded = await self._run("sweep")
        return [key.decode() for key in discarded], None if due < 0 else due / 1000

    async def stats(self) -> QueueStats:
        """How much waits and runs, and which workers take jobs (one that drains takes none)."""
        with translated():
            async with self.redis.pipeline(transaction=False) as pipe:
                for index in ("ready", "delayed", "leases"):
                    pipe.zcard(f"{self.prefix}{index}:{self.name}")
                pipe.hvals(f"{self.prefix}worker-info:{self.name}")
                queued, delayed, running, workers = await pipe.execute()
        known = (msgspec.json.decode(raw, type=WorkerInfo) for raw in workers)
        return QueueStats(queued, delayed, running, tuple(worker for worker in known if worker.slots))

    async def _pop(self, key: str, timeout: float) -> str | None:
        with translated():
            popped: Any = self.redis.blpop([key], timeout=max(timeout, 0.01))  # type: ignore[arg-type]
            message = await popped
        return None if message is None else message[1].decode()

    async def _load(self, job_ids: Sequence[str]) -> list[Job]:
        async with self.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(self._job_key(job_id), list(JOB_FIELDS))
                pipe.zrank(f"{self.prefix}ready:{self.name}", job_id)
            rows = await pipe.execute()
        return [_job(fields, rank) for fields, rank in zip(rows[::2], rows[1::2], strict=True) if fields[0]]

    def _control_key(self, worker: str) -> str:
        return f"{self.prefix}control:{worker}"

    def _job_key(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    async def _run(self, script: str, *arguments: Any) -> Any:
        with translated():
            return await self._scripts[script](keys=[self.prefix], args=[self.name, *arguments])


def _stop_reason(answer: bytes) -> StopReason:
    return StopReason.LEASE_LOST if answer == b"lost" else StopReason(answer.decode())


def _claim(raw: Sequence[Any]) -> Claim:
    job_id, fence, attempt, spec, created, expires, now = raw
    decoded = msgspec.json.decode(spec, type=JobSpec)
    return Claim(job_id.decode(), fence, attempt, decoded, int(created), int(expires), now)


def _job(fields: Sequence[bytes | None], rank: int | None) -> Job:
    row = dict(zip(JOB_FIELDS, fields, strict=True))
    spec, state = row["spec"] or b"", (row["state"] or b"").decode()
    running, outcome, stop = row["running"], row["outcome"], row["stop"]
    return Job(
        spec=msgspec.json.decode(spec, type=JobSpec),
        state=JobState(state),
        created_at=int(row["created"] or 0),
        expires_at=int(row["expires"] or 0),
        attempt=int(row["attempt"] or 0),
        started_at=None if row["started"] is None else int(row["started"]),
        finished_at=None if row["finished"] is None else int(row["finished"]),
        running=None if running is None else msgspec.json.decode(running, type=Running),
        outcome=None if outcome is None else msgspec.json.decode(outcome, type=Outcome),
        stop_requested=None if stop is None else StopReason(stop.decode()),
        queue_position=rank if state == JobState.QUEUED else None,
    )
