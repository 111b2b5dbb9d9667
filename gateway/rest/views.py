"""How a job looks in JSON."""

from datetime import UTC, datetime

import msgspec

from img2img.jobs import (
    Eta,
    Failure,
    Job,
    JobEvent,
    JobState,
    Move,
    PastAttempt,
    PreviewPicture,
    Receipt,
    Result,
    Stage,
    UpstreamCall,
)
from img2img.requests import JobOptions, Parameters


class ResultView(msgspec.Struct, frozen=True):
    """The finished picture; its bytes are at ``links.image`` until ``expires_at``."""

    media_type: str
    width: int
    height: int
    bytes: int
    sha256: str
    expires_at: datetime
    receipt: Receipt | None
    upstream: UpstreamCall | None


class EtaView(msgspec.Struct, frozen=True):
    """When a job will be done, going by measured times: with even chances by ``p50``, with nine in ten by ``p90``."""

    p50: datetime
    p90: datetime


class AttemptView(msgspec.Struct, frozen=True):
    """An attempt that brought no result."""

    attempt: int
    worker: str
    started_at: datetime
    ended_at: datetime
    error: Failure


class Links(msgspec.Struct, frozen=True, kw_only=True):
    self_: str = msgspec.field(name="self")
    events: str
    image: str
    cancel: str
    replay: str


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job: what was asked for, how far it is, how it ended. Times are RFC 3339, ``timings`` in seconds.

    ``failures``, ``crashes`` (of its workers) and ``interruptions`` count attempts without a result since the job was
    submitted or replayed; ``history`` tells of the latest ones. ``eta`` is null where nothing was measured yet.
    ``pool`` is where the job waits, runs or ended; ``trace_id`` names the trace in which it was sent, if there is one.
    """

    id: str
    state: JobState
    attempt: int
    trace_id: str | None
    parameters: Parameters
    options: JobOptions
    seed: int
    pool: str
    width: int | None
    height: int | None
    created_at: datetime
    expires_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    queue_position: int | None
    eta: EtaView | None
    step: int | None
    steps: int | None
    executed_by: str | None
    timings: dict[Stage, float]
    failures: int
    crashes: int
    interruptions: int
    replays: int
    history: tuple[AttemptView, ...]
    warnings: tuple[str, ...]
    error: Failure | None
    result: ResultView | None
    links: Links


class JobList(msgspec.Struct, frozen=True):
    """Newest first; ``next`` is the ``cursor`` of the following page, null on the last."""

    jobs: list[JobView]
    next: str | None


class EventView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of the event log, as it is sent in ``data`` of a server-sent event.

    A ``queued`` event after a replay has ``replays``: how many there were; one that tells of a move to another pool has
    the ``pool`` and ``moved``: which one the job left, and why. A ``preview`` event has its picture,
    with the file in base64, until a later one has come or the attempt has ended.
    """

    seq: int
    type: str
    at: datetime
    state: JobState
    attempt: int | None = None
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    error: dict[str, object] | None = None
    replays: int | None = None
    pool: str | None = None
    moved: Move | None = None
    preview: PreviewPicture | None = None


def job_view(job: Job) -> JobView:
    spec, running, outcome = job.spec, job.running, job.outcome
    result = None if outcome is None else outcome.result
    shown = result or running
    return JobView(
        id=job.id,
        state=job.state,
        attempt=job.attempt,
        trace_id=spec.trace_id,
        parameters=spec.parameters,
        options=spec.options,
        seed=spec.seed,
        pool=job.pool,
        width=spec.parameters.width if shown is None else shown.width,
        height=spec.parameters.height if shown is None else shown.height,
        created_at=_time(job.created_at),
        expires_at=_time(job.expires_at),
        started_at=None if job.started_at is None else _time(job.started_at),
        finished_at=None if job.finished_at is None else _time(job.finished_at),
        queue_position=job.queue_position,
        eta=None if job.eta is None else _eta(job.eta),
        step=running.step if running and job.state == JobState.RUNNING else None,
        steps=running.steps if running and job.state == JobState.RUNNING else None,
        executed_by=job.executed_by,
        timings=job.timings,
        failures=job.failures,
        crashes=job.crashes,
        interruptions=job.interruptions,
        replays=job.replays,
        history=tuple(_attempt(past) for past in job.history),
        warnings=spec.warnings if outcome is None else outcome.warnings,
        error=None if outcome is None else outcome.error,
        result=None if result is None else _result(result),
        links=_links(f"/v1/jobs/{job.id}"),
    )


def event_view(event: JobEvent) -> EventView:
    data = event.data
    return EventView(
        seq=event.seq,
        type=event.type,
        at=_time(event.at),
        state=event.state,
        attempt=_int(data.get("attempt")),
        stage=data["stage"] if isinstance(data.get("stage"), str) else None,  # type: ignore[arg-type]
        step=_int(data.get("step")),
        steps=_int(data.get("steps")),
        error=data["error"] if isinstance(data.get("error"), dict) else None,  # type: ignore[arg-type]
        replays=_int(data.get("replays")),
        pool=data["pool"] if isinstance(data.get("pool"), str) else None,  # type: ignore[arg-type]
        moved=event.move,
        preview=event.preview,
    )


def _links(base: str) -> Links:
    return Links(
        self_=base,
        events=f"{base}/events",
        image=f"{base}/image",
        cancel=f"{base}/cancel",
        replay=f"{base}/replay",
    )


def _eta(eta: Eta) -> EtaView:
    return EtaView(_time(eta.p50), _time(eta.p90))


def _attempt(past: PastAttempt) -> AttemptView:
    return AttemptView(past.attempt, past.worker, _time(past.started_at), _time(past.ended_at), past.error)


def _result(result: Result) -> ResultView:
    fields = msgspec.structs.asdict(result) | {"expires_at": _time(result.expires_at)}
    del fields["blob"]
    return ResultView(**fields)


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) else None
