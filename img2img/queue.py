"""The job queue: arq's formats on Redis, our own claim, lease and fence. Keys and scripts: docs/queue.md.

A job is accepted, claimed, reported on and ended by one Lua script each, so that a crash between two commands
cannot leave half a change. arq's payload, its queue's sorted set and its result key are kept up to date:
``arq.jobs.Job`` answers for our jobs too.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
import structlog
import uuid_utils
from arq.connections import ArqRedis

from img2img.errors import (
    IdempotencyConflict,
    JobNotFound,
    LeaseLost,
    NoCapacity,
    NotReplayable,
)
from img2img.jobs import (
    Failure,
    Job,
    JobSpec,
    JobState,
    OnLost,
    Outcome,
    PreviewPicture,
    Running,
    StopReason,
    StoredCheckpoint,
)
from img2img.queue_types import (
    Candidate,
    Claim,
    Discard,
    Join,
    Lifetime,
    Page,
    QueueStats,
    Rules,
    Share,
    Submitted,
    Waiter,
    WorkerInfo,
)
from img2img.records import (
    JOB_FIELDS,
    order_of,
    read_claim,
    read_discard,
    read_job,
    read_refusal,
    read_stop,
)
from img2img.scripts import Scripts
from img2img.server import milliseconds, translated

SHARD: Final = 0
LIST_SCAN: Final = 500
LIST_STEP: Final = 100
UNAFFORDABLE: Final = b"unaffordable "
UNREADABLE_DELAY: Final = 10.0

log = structlog.get_logger(__name__)


class JobQueue:
    """One queue of one shard. Every method raises ``Unavailable`` when the server cannot be reached."""

    def __init__(self, redis: ArqRedis, name: str = "default", rules: Rules | None = None) -> None:
        self.redis = redis
        self.name = name
        self.prefix = f"img2img:{{{SHARD}}}:"
        self.alive_key = f"arq:queue:{{{SHARD}}}:{name}"
        self.wake_key = f"{self.prefix}wake:{name}"
        self._rules = rules or Rules()
        self._scripts = Scripts(redis, self.prefix, name)

    def sibling(self, name: str) -> "JobQueue":
        """Another queue of the same server, with the same rules."""
        return JobQueue(self.redis, name, self._rules)

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
        self,
        spec: JobSpec,
        lifetime: Lifetime,
        *,
        share: Share | None = None,
        join: Join | None = None,
        waiter: Waiter | None = None,
        pools: Sequence[Candidate] = (),
    ) -> Submitted:
        """Accept a job, or find the one it joins. Safe to repeat with the same id.

        It goes to the first of ``pools`` that suits it, by default to this queue.

        Raises:
            IdempotencyConflict: the join key belongs to another request.
            NoCapacity: ``reject_if_busy`` was asked for and no worker is free.
            QueueFull, AccountQueueFull, DeadlineUnreachable: too much waits.
            SpendCapReached: the pools that would take it cost more than may be spent today.
        """
        order = order_of(spec, lifetime, share or Share(), self._rules) | {"join": join, "waiter": waiter}
        order["pools"] = pools or (Candidate(self.name, max_queued=self._rules.max_queued),)
        answer = await self._scripts.run_with_others("submit", msgspec.json.encode(spec), msgspec.json.encode(order))
        match [part.decode() for part in answer]:
            case ["joined", job_id]:
                return Submitted(job_id, created=False)
            case ["conflict"]:
                raise IdempotencyConflict
            case ["busy"]:
                raise NoCapacity("Every worker is busy: try again, or send the request without rejectIfBusy")
            case [why, pause, eta]:
                raise read_refusal(why, float(pause), float(eta) if eta else None)
        return Submitted(spec.id, created=True, pool=answer[1].decode())

    async def get(self, job_id: str, account: str | None = None) -> Job:
        """The job as it stands; with ``account``, only if it is that account's.

        Raises:
            JobNotFound: there is none, it is another account's, or its record has expired.
        """
        found = [read_job(row) for _, row in await self._rows([job_id])]
        if not found or (account is not None and found[0].spec.account != account):
            raise JobNotFound(job_id)
        return found[0]

    async def list_jobs(
        self, account: str, *, state: JobState | None = None, cursor: str | None = None, limit: int = 20
    ) -> Page:
        """The account's jobs, newest first; looks at a bounded number of jobs, so a page can be short."""
        found: list[Job] = []
        step = limit if state is None else max(limit, LIST_STEP)  # of one state there may be few
        for _ in range(0, LIST_SCAN, step):
            # From the last job on, not from a place: new jobs move those that there are on to the next one.
            ids = [raw.decode() for raw in await self._scripts.run("page", account, cursor or "", step)]
            for job in await self._load(ids):
                if state is None or job.state == state:
                    found.append(job)
                    if len(found) == limit:
                        return Page(tuple(found), job.id)
            if len(ids) < step:
                return Page(tuple(found), None)
            cursor = ids[-1]
        return Page(tuple(found), cursor)

    async def claim(
        self, worker: str, count: int, lease: float, token: str, *, engine: str = "", held: Sequence[Claim] = ()
    ) -> tuple[list[Claim], float | None]:
        """Take up to ``count`` jobs; also says in how many seconds the queue needs looking at again.

        ``engine`` names what will run them, for the measured times; ``held`` are those that the worker runs already.
        Until it has answered, repeat it with the same ``token``: it then hands out the same jobs again.
        """
        suspects = sum(claim.suspect for claim in held)
        due, *claims = await self._scripts.run(
            "claim", worker, engine, count, len(held), suspects, milliseconds(lease), token
        )
        readable = [claim for raw in claims if (claim := await self._readable(raw))]
        return readable, None if due < 0 else due / 1000

    async def _readable(self, raw: Sequence[Any]) -> Claim | None:
        """The claim; a job that this release cannot read goes back, for a newer worker to take."""
        try:
            return read_claim(raw)
        except msgspec.MsgspecError as exc:
            why = f"A worker of another release cannot read the job: {exc}"
            delay = milliseconds(UNREADABLE_DELAY)
            await self._scripts.run("release", raw[0], raw[1], "failures", delay, "internal", why)
            return None

    async def beat(
        self, worker: WorkerInfo, claims: Sequence[Claim], *, lease: float, ttl: float
    ) -> dict[int, StopReason]:
        """Keep the worker known and its claims alive; answers which must stop, by their fence, and why."""
        held = [value for claim in claims for value in (claim.id, claim.fence)]
        info = msgspec.json.encode(worker)
        answers = await self._scripts.run(
            "beat", worker.id, milliseconds(ttl), info, worker.slots, worker.native_pixels, milliseconds(lease), *held
        )
        told = zip(claims, answers, strict=True)
        return {claim.fence: read_stop(answer) for claim, answer in told if answer != b"ok"}

    async def wait_for_work(self, timeout: float) -> None:
        """Sleep until a job is submitted, or ``timeout`` seconds; a lost ring costs no more than that."""
        await self._pop(self.wake_key, timeout)

    async def next_stop(self, worker: str, timeout: float) -> str | None:
        """The next job of which an attempt by this worker is, or was, to stop; None after ``timeout`` seconds.

        Whether it still is, and why, a beat tells.
        """
        message = await self._pop(f"{self.prefix}control:{worker}", timeout)
        return None if message is None else message.partition(" ")[0]

    async def sign_off(self, worker: str) -> None:
        """Forget a worker that holds nothing, and ring once for the token that it may have taken."""
        await self._scripts.run("sign_off", worker)

    async def report(self, claim: Claim, running: Running) -> StopReason | None:
        """Record progress; answers with the reason if the job should stop."""
        answer = await self._scripts.run("report", claim.id, claim.fence, msgspec.json.encode(running))
        return None if answer == b"ok" else read_stop(answer)

    async def checkpoint(self, claim: Claim, checkpoint: StoredCheckpoint) -> StopReason | None:
        """Record where the next attempt can go on, in place of what was recorded before. Safe to repeat.

        Answers with the reason if the job should stop; after ``LEASE_LOST`` nothing was written.
        """
        answer = await self._scripts.run("checkpoint", claim.id, claim.fence, msgspec.json.encode(checkpoint))
        return None if answer == b"ok" else read_stop(answer)

    async def preview(self, claim: Claim, step: int, steps: int, picture: PreviewPicture) -> StopReason | None:
        """Show what the attempt has after ``step`` of its ``steps``; answers with the reason if the job should stop."""
        bare = {"step": step, "steps": steps}
        whole = msgspec.json.encode(bare | msgspec.structs.asdict(picture))
        answer = await self._scripts.run("preview", claim.id, claim.fence, whole, msgspec.json.encode(bare))
        return None if answer == b"ok" else read_stop(answer)

    async def sent(self, claim: Claim, call: int, on_lost: OnLost | None, *, billed: bool = False) -> StopReason | None:
        """Record, before it is made, a call that may be billed; None takes the word back. Safe to repeat.

        ``call`` numbers the attempt's calls; ``on_lost`` is what becomes of the job if the attempt ends without that
        call's answer. With None, what the call costs pays for the next one, unless it was ``billed`` all the same.
        Answers with the reason if the job should stop; after ``LEASE_LOST`` nothing was written.

        Raises:
            SpendCapReached: the call must not be made, because it would cost more than may be spent today.
        """
        answer = await self._scripts.run("sent", claim.id, claim.fence, call, on_lost or "", int(billed))
        if answer.startswith(UNAFFORDABLE):
            raise read_refusal("spend", float(answer.removeprefix(UNAFFORDABLE)), None)
        return None if answer == b"ok" else read_stop(answer)

    async def finish(self, claim: Claim, outcome: Outcome) -> None:
        """End the job: record, terminal event and arq's result in one step. Safe to repeat.

        Raises:
            LeaseLost: somebody else holds the job now; nothing was written.
        """
        answer = msgspec.json.encode(outcome)
        if not await self._scripts.run_with_others("finish", claim.id, claim.fence, outcome.state.value, answer):
            raise LeaseLost(f"Job {claim.id} is no longer held under fence {claim.fence}")

    async def release(
        self, claim: Claim, why: Failure, kind: Literal["failures", "interruptions"], *, delay: float = 0.0
    ) -> None:
        """Give the job back for another attempt; ``kind`` is what it counts as, and only failures are limited.

        Safe to repeat.

        Raises:
            LeaseLost: somebody else holds the job now; nothing was written.
        """
        done = await self._scripts.run(
            "release", claim.id, claim.fence, kind, milliseconds(delay), why.code, why.message
        )
        if not done:
            raise LeaseLost(f"Job {claim.id} is no longer held under fence {claim.fence}")

    async def cancel(self, job_id: str, reason: StopReason = StopReason.USER) -> JobState:
        """Ask a job to stop, in any state and as often as wanted; a queued one ends at once.

        Raises:
            JobNotFound: there is none.
        """
        state = await self._scripts.run("cancel", job_id, reason.value)
        if state is None:
            raise JobNotFound(job_id)
        return JobState(state.decode())

    async def replay(self, job_id: str, lifetime: float) -> JobState:
        """Run an ended job again under its id; answers with its state before, of which only ``failed``,
        ``canceled`` and ``expired`` are queued anew. ``lifetime`` is in seconds from now.

        Raises:
            JobNotFound: there is none.
            NotReplayable: its input is being deleted at this moment.
            SpendCapReached: the pools that it may go to cost more than may be spent today.
        """
        state = await self._scripts.run("replay", job_id, milliseconds(lifetime))
        if state is None:
            raise JobNotFound(job_id)
        if state == b"discarding":
            raise NotReplayable("The job's input picture is being deleted: send the request anew")
        if state.startswith(UNAFFORDABLE):
            raise read_refusal("spend", float(state.removeprefix(UNAFFORDABLE)), None)
        return JobState(state.decode())

    async def wait_for(self, job_id: str, waiter: Waiter) -> None:
        """Renew a waiter's interest in a job that ends when nobody waits for it."""
        await self._scripts.run("wait", job_id, waiter.id, waiter.ttl, waiter.grace)

    async def leave(self, job_id: str, waiter: Waiter) -> None:
        """A waiter goes; the last one starts the grace period."""
        await self._scripts.run("leave", job_id, waiter.id, waiter.grace)

    async def sweep(self) -> tuple[list[Discard], float | None]:
        """End what is overdue; answers which blobs may go, and in how many seconds there is more to do."""
        due, *words = await self._scripts.run("sweep")
        return [read_discard(word.decode()) for word in words], None if due < 0 else due / 1000

    async def names(self) -> set[str]:
        """Of all queues of this server that ever had a job."""
        with translated():
            members: Any = self.redis.smembers(f"{self.prefix}queues")
            return {name.decode() for name in await members}

    async def discarded(self, discard: Discard) -> None:
        """It has been done; until then it is told again."""
        with translated():
            await self.redis.zrem(f"{self.prefix}discarding", discard.word)

    async def stats(self) -> QueueStats:
        """How much waits and runs, and which workers take jobs, now or after a pause (one that drains takes none)."""
        waiting, delayed, running, quarantined, *work, workers, oldest = await self._scripts.run("stats")
        known = (msgspec.json.decode(raw, type=WorkerInfo) for raw in workers)
        taking = tuple(worker for worker in known if worker.slots or worker.paused)
        seconds, left = (round(float(part), 3) for part in work)
        return QueueStats(waiting - delayed, delayed, running, quarantined, seconds, left, oldest / 1000, taking)

    async def _pop(self, key: str, timeout: float) -> str | None:
        with translated():
            popped: Any = self.redis.blpop([key], timeout=max(timeout, 0.01))  # type: ignore[arg-type]
            message = await popped
        return None if message is None else message[1].decode()

    async def _load(self, job_ids: Sequence[str]) -> list[Job]:
        """Those of the jobs that there are and that this release can read: one of another must not hide the others."""
        jobs: list[Job] = []
        for job_id, row in await self._rows(job_ids):
            try:
                jobs.append(read_job(row))
            except (msgspec.MsgspecError, ValueError) as exc:
                log.warning("job_unreadable", job=job_id, error=str(exc))
        return jobs

    async def _rows(self, job_ids: Sequence[str]) -> list[tuple[str, Sequence[Any]]]:
        """The records, for :func:`read_job`, of those of the jobs that there are."""
        rows = await self._scripts.run("look", len(JOB_FIELDS), *JOB_FIELDS, *job_ids)
        return [(job_id, row) for job_id, row in zip(job_ids, rows, strict=True) if row is not None]
