"""From the client's values to protobuf messages and back: all that the two clients share about the wire."""

import hashlib
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from img2img.client.values import (
    AttemptInfo,
    ClientError,
    EtaInfo,
    Event,
    JobInfo,
    JobPage,
    MoveInfo,
    RequestFields,
    ResultInfo,
    Violation,
)
from img2img.errors import InvalidRequest
from img2img.images import PictureInfo
from img2img.jobs import Failure, JobState, PreviewPicture, Receipt, Stage, UpstreamCall
from img2img.requests import JobOptions, OutputFormat, Parameters, Sampler, build_request
from img2img.v1 import img2img_pb2 as pb

FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 5.0
FIRST_TRIES: Final = 4
RESUME_TRIES: Final = 8
LASTED: Final = 45.0
"""Seconds after which a stream that breaks off had been one: a connection that cannot be made fails sooner."""
PLAIN_OPTIONS: Final = (
    "priority", "deadline_seconds", "output_quality", "reject_if_busy", "reproducible", "previews", "model",
)  # fmt: skip
RESUMED: Final = frozenset({"unavailable", "cancelled"})  # what a gateway's restart does to a stream


def generate_request(fields: RequestFields) -> pb.GenerateRequest:
    return pb.GenerateRequest(**_job_request(fields))


def create_request(fields: RequestFields) -> pb.CreateJobRequest:
    return pb.CreateJobRequest(**_job_request(fields))


def list_request(state: JobState | None, limit: int, page: str | None) -> pb.ListJobsRequest:
    name = f"JOB_STATE_{JobState(state).name}" if state else None
    return pb.ListJobsRequest(page_size=limit, page_token=page or "", state=name)


def _job_request(fields: RequestFields) -> dict[str, Any]:
    values: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    options = values.pop("options", None)
    key = values.pop("idempotency_key", None) or str(uuid.uuid4())
    for name in ("image", "mask"):
        if isinstance(values.get(name), Path):
            values[name] = values[name].read_bytes()
    try:
        return {
            "request": pb.Img2ImgRequest(**values),
            "options": _options_message(options),
            "idempotency_key": key,
        }
    except (TypeError, ValueError) as exc:
        raise _refusal(values, options, exc) from exc


def _refusal(values: Mapping[str, Any], options: JobOptions | None, error: Exception) -> ClientError:
    """Why no message can hold the request, for instance a number beyond its field's bits, in the service's words."""
    try:
        build_request(values, msgspec.to_builtins(options))
    except InvalidRequest as exc:
        return ClientError(exc.code, str(exc), (Violation(exc.field, exc.reason),))
    return ClientError(InvalidRequest.code, str(error))


def _options_message(options: JobOptions | None) -> pb.JobOptions | None:
    if options is None:
        return None
    if options.not_before is not None and options.not_before.tzinfo is None:
        raise ValueError("a time without an offset is no instant")
    return pb.JobOptions(
        priority=options.priority,
        deadline_seconds=options.deadline_seconds,
        sampler=f"SAMPLER_{Sampler(options.sampler).name}" if options.sampler else None,
        output_format=f"OUTPUT_FORMAT_{OutputFormat(options.output_format).name}",
        output_quality=options.output_quality,
        reject_if_busy=options.reject_if_busy,
        not_before=options.not_before,
        reproducible=options.reproducible,
        previews=options.previews,
        model=options.model,
    )


def job_page(message: pb.ListJobsResponse) -> JobPage:
    return JobPage(tuple(job_info(job) for job in message.jobs), message.next_page_token or None)


def job_info(job: pb.Job) -> JobInfo:
    return JobInfo(
        id=job.id,
        state=_state(job.state),
        attempt=job.attempt,
        parameters=_parameters(job.parameters, job.seed),
        options=_options(job.options),
        seed=job.seed,
        created_at=_time(job.create_time),
        expires_at=_time(job.expire_time),
        started_at=_time(job.start_time) if job.HasField("start_time") else None,
        finished_at=_time(job.finish_time) if job.HasField("finish_time") else None,
        executed_by=job.executed_by,
        pool=job.pool,
        eta=EtaInfo(_time(job.eta.p50), _time(job.eta.p90)) if job.HasField("eta") else None,
        timings=_timings(job.timings),
        failures=job.failures,
        crashes=job.crashes,
        interruptions=job.interruptions,
        replays=job.replays,
        history=tuple(_attempt(past) for past in job.history),
        warnings=tuple(job.warnings),
        error=_failure(job.error) if job.HasField("error") else None,
        result=_result(job.result) if job.HasField("result") else None,
        **_present(job, "queue_position", "step", "steps", "width", "height", "trace_id"),
    )


def event(message: pb.WatchJobResponse) -> Event:
    return Event(
        sequence=message.sequence,
        type=message.type,
        at=_time(message.time),
        state=_state(message.state),
        attempt=message.attempt,
        stage=message.stage,
        step=message.step,
        steps=message.steps,
        error=_failure(message.error) if message.HasField("error") else None,
        preview=_preview(message.preview) if message.HasField("preview") else None,
        moved=MoveInfo(message.moved.from_pool, message.moved.why) if message.HasField("moved") else None,
        **_present(message, "replays", "pool"),
    )


def _parameters(message: pb.Parameters, seed: int) -> Parameters:
    return Parameters(
        prompt=message.prompt,
        image=_picture(message.image) if message.HasField("image") else None,
        mask=_picture(message.mask) if message.HasField("mask") else None,
        num_steps=message.num_steps,
        strength=message.strength,
        guidance=message.guidance,
        seed=seed,
        **_present(message, "negative_prompt", "height", "width"),
    )


def _picture(message: pb.PictureInfo) -> PictureInfo:
    return PictureInfo(message.format, message.width, message.height, message.size_bytes, message.sha256)


def _options(message: pb.JobOptions) -> JobOptions:
    values: dict[str, Any] = _present(message, *PLAIN_OPTIONS)
    if message.sampler:
        values["sampler"] = Sampler[pb.Sampler.Name(message.sampler).removeprefix("SAMPLER_")]
    if message.output_format:
        name = pb.OutputFormat.Name(message.output_format).removeprefix("OUTPUT_FORMAT_")
        values["output_format"] = OutputFormat[name]
    if message.HasField("not_before"):
        values["not_before"] = _time(message.not_before)
    return JobOptions(**values)


def _attempt(message: pb.PastAttempt) -> AttemptInfo:
    return AttemptInfo(
        attempt=message.attempt,
        worker=message.worker,
        started_at=_time(message.start_time),
        ended_at=_time(message.end_time),
        error=_failure(message.error),
    )


def _result(message: pb.JobResult) -> ResultInfo:
    return ResultInfo(
        media_type=message.media_type,
        width=message.width,
        height=message.height,
        size_bytes=message.size_bytes,
        sha256=message.sha256,
        expires_at=_time(message.expire_time),
        receipt=_receipt(message.receipt) if message.HasField("receipt") else None,
        upstream=_upstream(message.upstream) if message.HasField("upstream") else None,
    )


def _receipt(message: pb.Receipt) -> Receipt:
    return Receipt(
        pixels_sha256=message.pixels_sha256,
        model=message.model,
        revision=message.revision,
        weights=dict(message.weights),
        sampler=message.sampler,
        steps=message.steps,
        precision=message.precision,
        device=message.device,
        versions=dict(message.versions),
        **_present(message, "rows"),
    )


def _upstream(message: pb.UpstreamCall) -> UpstreamCall:
    return UpstreamCall(request_id=message.request_id, account=message.account, **_present(message, "neurons"))


def _timings(timings: Mapping[str, float]) -> dict[str, float]:
    """In the order in which a job goes through them, which a protobuf map does not keep."""
    return {stage: timings[stage] for stage in [*Stage, *timings] if stage in timings}


def _state(number: int) -> JobState:
    return JobState[pb.JobState.Name(number).removeprefix("JOB_STATE_")]


def _preview(message: pb.Preview) -> PreviewPicture:
    return PreviewPicture(message.media_type, message.width, message.height, message.image)


def _failure(error: pb.JobError) -> Failure:
    return Failure(error.code, error.message)


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def _present(message: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


class Progress:
    """Where a client stands in a job's event log, and whether a broken stream is worth another try.

    A log goes on after a terminal event when its job is replayed: only one with which the stream itself ends, and is
    not broken, is the job's end.
    """

    def __init__(self, after: int) -> None:
        self.after = after
        self.ended = False
        self._terminal = False
        self._failures = 0
        self._tries = FIRST_TRIES
        self._asked_at = 0.0

    def request(self, job_id: str) -> pb.WatchJobRequest:
        self._asked_at = time.monotonic()
        return pb.WatchJobRequest(id=job_id, after=self.after)

    def take(self, message: pb.WatchJobResponse) -> Event:
        taken = event(message)
        self.after = taken.sequence
        self._terminal = taken.state.is_terminal
        self._failures, self._tries = 0, RESUME_TRIES
        return taken

    def pause(self, error: ClientError | None) -> float:
        """Seconds to wait before the next try, 0 when it ``ended``; ``error`` is why the stream broke, if it did.

        Raises:
            ClientError: ``error``, when another try would not help, or did not, time after time.
        """
        self.ended = self._terminal and error is None
        if self.ended:
            return 0.0
        error = error or ClientError("unavailable", "The service closed the event stream before the job's end")
        # A job may be silent for hours, and proxies end silent streams: what ended a good one is no failure to resume.
        self._failures = 1 if time.monotonic() - self._asked_at >= LASTED else self._failures + 1
        if error.code not in RESUMED or self._failures >= self._tries:
            raise error
        return float(min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE))


class Parts:
    """Puts a streamed picture together."""

    def __init__(self) -> None:
        self._result = pb.JobResult()
        self._chunks: list[bytes] = []

    def add(self, message: pb.GetResultResponse) -> None:
        if message.HasField("result"):
            self._result = message.result
        else:
            self._chunks.append(message.chunk)

    def joined(self) -> bytes:
        """The whole file.

        Raises:
            ClientError: it is not what the service announced.
        """
        data = b"".join(self._chunks)
        if hashlib.sha256(data).hexdigest() != self._result.sha256:
            raise ClientError("data_loss", "The picture arrived incomplete or damaged: fetch it again")
        return data
