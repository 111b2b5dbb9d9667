"""What callers hand to the queue, and what it answers."""

from typing import Final, Literal

import msgspec

from img2img.jobs import Job, JobSpec, StoredCheckpoint

INPUT_BLOB: Final = "input:"
"""How the key of a job's input files begins."""


class Rules(msgspec.Struct, frozen=True):
    """What a queue grants its jobs: each may fail ``attempts`` times and lose ``crash_limit`` workers.

    A level of priority is a head start of ``priority_seconds``. ``max_queued`` jobs may wait (0: no limit) where a
    submission names no pools; with ``refuse_late`` a job that will hardly meet its deadline is refused.
    """

    attempts: int = 3
    crash_limit: int = 2
    priority_seconds: float = 30.0
    max_queued: int = 0
    refuse_late: bool = True


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

    ``asked_for`` tells a deadline of the caller's, which counts from now, from the longest age, which counts from
    when the job may start. ``longest`` is how long any job may live, for what belongs to more than one job.
    """

    seconds: float
    keep: float
    longest: float = 24 * 3600.0
    asked_for: bool = False


class Share(msgspec.Struct, frozen=True):
    """What an account is entitled to: ``weight`` of the workers' time, ``max_queued`` waiting jobs (0: no limit).

    ``local_only``: its pictures are not made outside. ``spend_per_day`` takes the place of the pools' cap for tenants.
    """

    weight: float = 1.0
    max_queued: int = 0
    local_only: bool = False
    spend_per_day: float | None = None


MILLIONTHS: Final = 1_000_000
"""Amounts of money are counted in whole millionths."""


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pool that a job may go to. Times in ms, amounts in millionths; None: no such limit.

    ``max_wait`` is how long a job may wait there before it had better go elsewhere, ``start`` how long a first worker
    takes to come up. A call costs ``price``; ``cap`` is for all tenants together, ``tenant_cap`` for the job's own.
    """

    name: str
    max_queued: int = 0
    max_wait: int | None = None
    start: int = 0
    price: int = 0
    cap: int | None = None
    tenant_cap: int | None = None


class Submitted(msgspec.Struct, frozen=True):
    """The job that answers a submission; ``created`` is false when it joined an earlier one, else ``pool`` took it."""

    id: str
    created: bool
    pool: str = ""


class Claim(msgspec.Struct, frozen=True):
    """A worker's hold on a job: every write of this attempt carries ``fence``. Times in ms since 1970.

    A ``suspect`` has lost a worker before: one that is claimed by an idle worker runs alone there. An earlier attempt
    may have left a ``checkpoint`` to go on from. Given back, one that ``may_go_elsewhere`` need not wait for this pool.
    """

    id: str
    fence: int
    attempt: int
    spec: JobSpec
    created_at: int
    expires_at: int
    claimed_at: int
    suspect: bool = False
    failures: int = 0
    checkpoint: StoredCheckpoint | None = None
    may_go_elsewhere: bool = False


class WorkerInfo(msgspec.Struct, frozen=True):
    """What a worker says of itself: how many jobs it runs at once now, and the pixels of its model's own size.

    One that is ``paused`` has no slots for the moment; without slots and not paused it takes no job any more.
    """

    id: str
    slots: int
    engine: str
    model: str
    device: str
    native_pixels: int = 0
    paused: bool = False


class Discard(msgspec.Struct, frozen=True):
    """A blob that no job needs any more; an input one is kept for ``kept`` seconds, for a replay."""

    word: str
    key: str
    kept: float

    @property
    def is_input(self) -> bool:
        """Whether users may want it kept for longer; what else jobs leave is of no use to anybody."""
        return self.key.startswith(INPUT_BLOB)


class QueueStats(msgspec.Struct, frozen=True):
    """Counts at one moment, with estimates of work: ``seconds`` of the jobs that are ready to start, and
    ``running_seconds`` of what is left of those that run.

    ``oldest_seconds`` is how long the one of the ready jobs waits that could start first; 0 when there is none.
    """

    queued: int
    delayed: int
    running: int
    quarantined: int
    seconds: float
    running_seconds: float
    oldest_seconds: float
    workers: tuple[WorkerInfo, ...]


class ServiceStats(QueueStats, frozen=True):
    """The same for all pools together, and for each of ``pools`` by its name."""

    pools: dict[str, QueueStats]

    @classmethod
    def of(cls, pools: dict[str, QueueStats]) -> "ServiceStats":
        """The sums over ``pools``."""
        every = pools.values()
        return cls(
            queued=sum(one.queued for one in every),
            delayed=sum(one.delayed for one in every),
            running=sum(one.running for one in every),
            quarantined=sum(one.quarantined for one in every),
            seconds=round(sum(one.seconds for one in every), 3),
            running_seconds=round(sum(one.running_seconds for one in every), 3),
            oldest_seconds=max((one.oldest_seconds for one in every), default=0.0),
            workers=tuple(worker for one in every for worker in one.workers),
            pools=pools,
        )


class Page(msgspec.Struct, frozen=True):
    """One page of a list; ``next`` is the cursor of the following one, None on the last."""

    jobs: tuple[Job, ...]
    next: str | None
