"""A job as everybody sees it. State diagram: docs/job-states.md."""

import re
from enum import StrEnum
from typing import Final, Literal

import msgspec

from img2img.requests import JobOptions, Parameters


class JobState(StrEnum):
    """``queued -> running -> succeeded | failed | canceled | expired``; interrupted: ``running -> queued``."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATES


JOB_ID: Final = re.compile(r"\d+-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""What the id of a job looks like, ``<shard>-<uuid7>``."""
OnLost = Literal["retry", "fail"]
"""What becomes of a job whose call of another service was sent and never answered, so that it may have been billed."""
TERMINAL_STATES: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED, JobState.EXPIRED})
PREVIEW: Final = "preview"
"""The type of an event that shows what a running job has so far."""


class StopReason(StrEnum):
    """Why a running job was stopped from outside."""

    USER = "user"
    DISCONNECT = "disconnect"
    DEADLINE = "deadline"
    SHUTDOWN = "shutdown"
    LEASE_LOST = "lease_lost"


class Stage(StrEnum):
    """Where a job's time goes, in order; the stages of a job add up to its whole life."""

    QUEUED = "queued"
    LOAD = "load"
    DECODE = "decode"
    UPSTREAM = "upstream"
    ENCODE_TEXT = "encode_text"
    ENCODE_IMAGE = "encode_image"
    STEPS = "steps"
    DECODE_IMAGE = "decode_image"
    CHECK = "check"
    ENCODE = "encode"
    STORE = "store"
    FINISH = "finish"


class Failure(msgspec.Struct, frozen=True):
    """A stable code and a sentence for a person."""

    code: str
    message: str


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What made a picture: where two agree in all but ``pixels_sha256``, and have ``rows``, they agree in that, too.

    ``weights`` are SHA-256 by network, ``rows`` is the fixed number of rows of each pass through the UNet (None unless
    the job was reproducible), ``precision`` the number format of the networks, ``versions`` those of packages.
    """

    pixels_sha256: str
    model: str
    revision: str
    weights: dict[str, str]
    sampler: str
    steps: int
    precision: str
    device: str
    versions: dict[str, str]
    rows: int | None = None


class UpstreamCall(msgspec.Struct, frozen=True, kw_only=True):
    """The call of another service that made a picture: what to name when asking that service about it.

    ``request_id`` is the service's own, "" where it gave none; ``account`` stands for the one that paid: the first
    digits of the SHA-256 of its id; ``neurons`` is the price, where the answer told it.
    """

    request_id: str
    account: str
    neurons: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Where the picture lies and what it is; ``expires_at`` in milliseconds since 1970."""

    blob: str
    media_type: str
    width: int
    height: int
    bytes: int
    sha256: str
    expires_at: int
    receipt: Receipt | None = None
    upstream: UpstreamCall | None = None


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What the current attempt has reported; replaced as a whole by each report."""

    executed_by: str
    width: int | None = None
    height: int | None = None
    stage: Stage | None = None
    step: int = 0
    steps: int = 0


class StoredCheckpoint(msgspec.Struct, frozen=True):
    """Where the state of a job's sampling after ``step`` of its ``steps`` lies, for an attempt to go on from."""

    blob: str
    step: int
    steps: int


class PreviewPicture(msgspec.Struct, frozen=True):
    """A small encoded picture of what a job has so far; in JSON its bytes are base64."""

    media_type: str
    width: int
    height: int
    image: bytes


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a job ended. ``timings`` are seconds per stage, as far as its last attempt could tell: up to ``FINISH``."""

    state: JobState
    result: Result | None = None
    error: Failure | None = None
    timings: dict[Stage, float] = {}
    warnings: tuple[str, ...] = ()
    executed_by: str | None = None


class PastAttempt(msgspec.Struct, frozen=True):
    """An attempt that brought no result. Times in milliseconds since 1970."""

    attempt: int
    worker: str
    started_at: int
    ended_at: int
    error: Failure


class Eta(msgspec.Struct, frozen=True):
    """When a job will be done: with even chances by ``p50``, with nine in ten by ``p90`` (ms since 1970)."""

    p50: int
    p90: int


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for: written once at submission, never changed. Times in milliseconds since 1970."""

    id: str
    account: str
    parameters: Parameters
    options: JobOptions
    seed: int
    fingerprint: str
    warnings: tuple[str, ...] = ()
    inputs: str | None = None
    trace: dict[str, str] = {}

    @property
    def trace_id(self) -> str | None:
        """Of the trace in which the job was sent, 32 hexadecimal digits; None where nobody traced it."""
        parent = self.trace.get("traceparent")
        return None if parent is None else parent.split("-")[1]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job at one moment. Times in milliseconds since 1970; ``attempt`` counts from 1, 0 before the first.

    ``failures``, ``crashes`` (of its workers) and ``interruptions`` count attempts without a result since the job
    was submitted or replayed; ``history`` tells of the latest ones. ``eta`` is None where nothing was measured yet.
    ``pool`` is where it waits, runs or ended.
    """

    spec: JobSpec
    state: JobState
    created_at: int
    expires_at: int
    attempt: int = 0
    started_at: int | None = None
    finished_at: int | None = None
    running: Running | None = None
    outcome: Outcome | None = None
    stop_requested: StopReason | None = None
    queue_position: int | None = None
    eta: Eta | None = None
    failures: int = 0
    crashes: int = 0
    interruptions: int = 0
    replays: int = 0
    history: tuple[PastAttempt, ...] = ()
    pool: str = ""

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def is_terminal(self) -> bool:
        return self.state.is_terminal

    @property
    def timings(self) -> dict[Stage, float]:
        """Seconds per stage, which add up to its life; none before its end, or where no attempt ended it.

        How long the outcome was on its way nobody knows who sends it, nor how long the claim was: that is what, by
        the server's own clock, the other stages leave to ``FINISH``.
        """
        if self.outcome is None or not self.outcome.timings or self.finished_at is None:
            return {}
        told = self.outcome.timings
        left = (self.finished_at - self.created_at) / 1000 - sum(told.values())
        return {**told, Stage.FINISH: round(max(0.0, left), 6)}

    @property
    def executed_by(self) -> str | None:
        """Engine, model and worker of the last attempt that said so."""
        if self.outcome is not None and self.outcome.executed_by is not None:
            return self.outcome.executed_by
        return None if self.running is None else self.running.executed_by


class Move(msgspec.Struct, frozen=True, rename={"from_pool": "from"}):
    """A queued job left a pool: it was ``late`` there, had ``no_workers``, or a pool before that was ``preferred``."""

    from_pool: str
    why: Literal["late", "no_workers", "preferred"]


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a job's log; ``seq`` counts 1, 2, 3 … without gaps, ``at`` is in milliseconds."""

    seq: int
    type: str
    at: int
    data: dict[str, object] = {}

    @property
    def is_terminal(self) -> bool:
        return self.type in TERMINAL_STATES

    @property
    def state(self) -> JobState:
        """The job's state after this event."""
        return JobState.RUNNING if self.type in ("progress", PREVIEW) else JobState(self.type)

    @property
    def move(self) -> Move | None:
        """Where the job was before, if this event tells that it moved."""
        return msgspec.convert(self.data["moved"], Move) if "moved" in self.data else None

    @property
    def preview(self) -> PreviewPicture | None:
        """The picture of a preview, for as long as the log keeps it: until the next one, or the attempt's end."""
        if self.type != PREVIEW or "image" not in self.data:
            return None
        return msgspec.convert(self.data, PreviewPicture)
