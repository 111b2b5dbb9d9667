"""What the client takes, returns and raises: plain values, no protobuf."""

from datetime import datetime
from pathlib import Path
from typing import Required, TypedDict

import msgspec

from img2img.jobs import Failure, JobState, PreviewPicture, Receipt, UpstreamCall
from img2img.requests import JobOptions, Parameters


class Violation(msgspec.Struct, frozen=True):
    """A field of the request that breaks the contract, and how."""

    field: str
    description: str


class ClientError(Exception):
    """What the service answered, or that it did not; ``code`` is the stable code, see docs/errors.md.

    Without an answer of the service's own, ``code`` is gRPC's status in small letters (``unavailable``,
    ``deadline_exceeded``). ``retry_after`` is the wait in seconds that the service advises; ``eta_seconds`` comes with
    a full queue: the time in which a job queued now would be done, where that is known.
    """

    def __init__(
        self,
        code: str,
        message: str,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
        eta_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after = retry_after
        self.eta_seconds = eta_seconds


class RequestFields(TypedDict, total=False):
    """What ``generate`` and ``create`` take; pictures as encoded files, or the paths of such files.

    ``None`` is the same as leaving a field out. A repetition with the same ``idempotency_key`` joins the
    first job; when none is given each call draws one, so that the client's own repetitions after a broken
    connection do.
    """

    prompt: Required[str]
    image: bytes | Path | None
    mask: bytes | Path | None
    negative_prompt: str | None
    width: int | None
    height: int | None
    num_steps: int | None
    strength: float | None
    guidance: float | None
    seed: int | None
    options: JobOptions | None
    idempotency_key: str | None


class ResultInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the finished picture is, and what made it; it can be read until ``expires_at``.

    ``upstream`` is the call that made it, if another service did.
    """

    media_type: str
    width: int
    height: int
    size_bytes: int
    sha256: str
    expires_at: datetime
    receipt: Receipt | None = None
    upstream: UpstreamCall | None = None


class EtaInfo(msgspec.Struct, frozen=True):
    """When a job will be done, going by measured times: with even chances by ``p50``, with nine in ten by ``p90``."""

    p50: datetime
    p90: datetime


class AttemptInfo(msgspec.Struct, frozen=True):
    """An attempt that brought no result."""

    attempt: int
    worker: str
    started_at: datetime
    ended_at: datetime
    error: Failure


class JobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the service shows it at one moment. ``timings`` are seconds per stage.

    ``failures``, ``crashes`` (of its workers) and ``interruptions`` count attempts without a result since the job was
    submitted or replayed; ``history`` tells of the latest ones. ``eta`` is None where nothing was measured yet.
    ``pool`` is where the job waits, runs or ended; ``trace_id`` names the trace in which it was sent, if there is one.
    """

    id: str
    state: JobState
    attempt: int
    parameters: Parameters
    options: JobOptions
    seed: int
    created_at: datetime
    expires_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    queue_position: int | None = None
    eta: EtaInfo | None = None
    step: int | None = None
    steps: int | None = None
    executed_by: str = ""
    pool: str = ""
    trace_id: str | None = None
    width: int | None = None
    height: int | None = None
    timings: dict[str, float] = {}
    failures: int = 0
    crashes: int = 0
    interruptions: int = 0
    replays: int = 0
    history: tuple[AttemptInfo, ...] = ()
    warnings: tuple[str, ...] = ()
    error: Failure | None = None
    result: ResultInfo | None = None


class JobPage(msgspec.Struct, frozen=True):
    """Some of the account's jobs, newest first; ``next_page`` asks for those after them."""

    jobs: tuple[JobInfo, ...]
    next_page: str | None


class MoveInfo(msgspec.Struct, frozen=True, rename={"from_pool": "from"}):
    """A queued job left a pool: it was ``late`` there, had ``no_workers``, or a pool before that was ``preferred``."""

    from_pool: str
    why: str


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a job's log; ``sequence`` counts from 1, ``step`` and ``steps`` come with progress and previews.

    ``replays`` comes with the ``queued`` of a replay: how many there were; ``pool`` and ``moved`` with that of a move
    to another pool. ``preview`` comes with a ``preview`` for as long as the service keeps its picture: until the next
    one, or the attempt's end.
    """

    sequence: int
    type: str
    at: datetime
    state: JobState
    attempt: int
    stage: str = ""
    step: int = 0
    steps: int = 0
    error: Failure | None = None
    replays: int | None = None
    pool: str | None = None
    moved: MoveInfo | None = None
    preview: PreviewPicture | None = None


class Picture(msgspec.Struct, frozen=True):
    """A finished picture: the encoded file, and the job that made it."""

    job: JobInfo
    data: bytes
