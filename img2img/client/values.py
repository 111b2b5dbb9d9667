"""What the client takes, returns and raises: plain values, no protobuf."""

from datetime import datetime
from pathlib import Path
from typing import Required, TypedDict

import msgspec

from img2img.jobs import Failure, JobState
from img2img.requests import JobOptions, Parameters


class Violation(msgspec.Struct, frozen=True):
    """A field of the request that breaks the contract, and how."""

    field: str
    description: str


class ClientError(Exception):
    """What the service answered, or that it did not; ``code`` is the stable code, see docs/errors.md.

    Without an answer of the service's own, ``code`` is gRPC's status in small letters (``unavailable``,
    ``deadline_exceeded``). ``retry_after`` is the wait in seconds that the service advises.
    """

    def __init__(
        self,
        code: str,
        message: str,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after = retry_after


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
    """What the finished picture is; it can be read until ``expires_at``."""

    media_type: str
    width: int
    height: int
    size_bytes: int
    sha256: str
    expires_at: datetime


class JobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the service shows it at one moment. ``timings`` are seconds per stage."""

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
    step: int | None = None
    steps: int | None = None
    executed_by: str = ""
    width: int | None = None
    height: int | None = None
    timings: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    error: Failure | None = None
    result: ResultInfo | None = None


class JobPage(msgspec.Struct, frozen=True):
    """Some of the account's jobs, newest first; ``next_page`` asks for those after them."""

    jobs: tuple[JobInfo, ...]
    next_page: str | None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a job's log; ``sequence`` counts from 1, ``step`` and ``steps`` come with progress."""

    sequence: int
    type: str
    at: datetime
    state: JobState
    attempt: int
    stage: str = ""
    step: int = 0
    steps: int = 0
    error: Failure | None = None


class Picture(msgspec.Struct, frozen=True):
    """A finished picture: the encoded file, and the job that made it."""

    job: JobInfo
    data: bytes
