"""Protobuf messages to what the service takes, and what it answers to protobuf messages."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from img2img.images import PictureInfo
from img2img.jobs import Failure, Job, JobEvent, JobState, PastAttempt, PreviewPicture, Receipt, Result
from img2img.requests import JobOptions, OutputFormat, Parameters, Sampler
from img2img.v1 import img2img_pb2 as pb

STATES: Final = {state: f"JOB_STATE_{state.name}" for state in JobState}
SAMPLERS: Final = {sampler: f"SAMPLER_{sampler.name}" for sampler in Sampler}
FORMATS: Final = {form: f"OUTPUT_FORMAT_{form.name}" for form in OutputFormat}
STATE_NUMBERS: Final = {pb.JobState.Value(name): state for state, name in STATES.items()}
_OPTION_NUMBERS: Final[Mapping[str, Mapping[int, str]]] = {
    "sampler": {pb.Sampler.Value(name): sampler.value for sampler, name in SAMPLERS.items()},
    "output_format": {pb.OutputFormat.Value(name): form.value for form, name in FORMATS.items()},
}


def request_fields(message: pb.Img2ImgRequest) -> dict[str, Any]:
    """The fields that are present, unchecked; pictures as their bytes."""
    return _present(message)


def option_fields(message: pb.JobOptions) -> dict[str, Any]:
    """The options that are present, unchecked; a number or a time that we do not know stays in as text."""
    fields = _present(message)
    for name, known in _OPTION_NUMBERS.items():
        if name in fields:
            fields[name] = known.get(fields[name], str(fields[name]))
    if "not_before" in fields:
        fields["not_before"] = _datetime(fields["not_before"])
    return fields


def job_message(job: Job) -> pb.Job:
    spec, outcome = job.spec, job.outcome
    message = pb.Job(
        id=job.id,
        state=STATES[job.state],
        attempt=job.attempt,
        parameters=_parameters(spec.parameters),
        options=_options(spec.options),
        seed=spec.seed,
        create_time=_time(job.created_at),
        expire_time=_time(job.expires_at),
        start_time=None if job.started_at is None else _time(job.started_at),
        finish_time=None if job.finished_at is None else _time(job.finished_at),
        queue_position=job.queue_position,
        eta=None if job.eta is None else pb.Eta(p50=_time(job.eta.p50), p90=_time(job.eta.p90)),
        failures=job.failures,
        crashes=job.crashes,
        interruptions=job.interruptions,
        replays=job.replays,
        pool=job.pool,
        trace_id=spec.trace_id,
        timings={stage.value: seconds for stage, seconds in job.timings.items()},
        history=map(_past_attempt, job.history),
        warnings=spec.warnings,
    )
    if job.executed_by is not None:
        message.executed_by = job.executed_by
    if job.running is not None:
        _set_size(message, job.running.width, job.running.height)
        if job.state == JobState.RUNNING:
            message.step, message.steps = job.running.step, job.running.steps
    if outcome is not None:
        message.warnings[:] = outcome.warnings or spec.warnings
        if outcome.error is not None:
            message.error.CopyFrom(_error(outcome.error))
        if outcome.result is not None:
            message.result.CopyFrom(result_message(outcome.result))
            _set_size(message, outcome.result.width, outcome.result.height)
    return message


def result_message(result: Result) -> pb.JobResult:
    return pb.JobResult(
        media_type=result.media_type,
        width=result.width,
        height=result.height,
        size_bytes=result.bytes,
        sha256=result.sha256,
        expire_time=_time(result.expires_at),
        receipt=None if result.receipt is None else _receipt(result.receipt),
        upstream=None if result.upstream is None else pb.UpstreamCall(**msgspec.structs.asdict(result.upstream)),
    )


def event_message(event: JobEvent, attempt: int) -> pb.WatchJobResponse:
    """An event of the job's log; ``attempt`` is the one that it happened in."""
    message = pb.WatchJobResponse(
        sequence=event.seq,
        type=event.type,
        time=_time(event.at),
        state=STATES[event.state],
        attempt=attempt,
        preview=_preview(event.preview),
    )
    match event.data:
        case {"stage": str(stage), "step": int(step), "steps": int(steps)}:
            message.stage, message.step, message.steps = stage, step, steps
        case {"step": int(step), "steps": int(steps)}:
            message.step, message.steps = step, steps
        case {"error": {"code": str(code), "message": str(text)}}:
            message.error.CopyFrom(_error(Failure(code, text)))
        case {"replays": int(replays)}:
            message.replays = replays
        case {"pool": str(pool)} if event.move is not None:
            message.pool = pool
            message.moved.CopyFrom(pb.Move(**msgspec.structs.asdict(event.move)))
    return message


def _present(message: Message) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def _parameters(parameters: Parameters) -> pb.Parameters:
    return pb.Parameters(
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        height=parameters.height,
        width=parameters.width,
        image=_picture(parameters.image),
        mask=_picture(parameters.mask),
        num_steps=parameters.num_steps,
        strength=parameters.strength,
        guidance=parameters.guidance,
    )


def _picture(info: PictureInfo | None) -> pb.PictureInfo | None:
    if info is None:
        return None
    return pb.PictureInfo(
        format=info.format, width=info.width, height=info.height, size_bytes=info.bytes, sha256=info.sha256
    )


def _receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(**msgspec.structs.asdict(receipt))  # field for field; a test compares the two


def _options(options: JobOptions) -> pb.JobOptions:
    return pb.JobOptions(
        priority=options.priority,
        deadline_seconds=options.deadline_seconds,
        sampler=None if options.sampler is None else SAMPLERS[options.sampler],
        output_format=FORMATS[options.output_format],
        output_quality=options.output_quality,
        reject_if_busy=options.reject_if_busy,
        not_before=options.not_before,
        reproducible=options.reproducible,
        previews=options.previews,
        model=options.model,
    )


def _past_attempt(past: PastAttempt) -> pb.PastAttempt:
    return pb.PastAttempt(
        attempt=past.attempt,
        worker=past.worker,
        start_time=_time(past.started_at),
        end_time=_time(past.ended_at),
        error=_error(past.error),
    )


def _preview(picture: PreviewPicture | None) -> pb.Preview | None:
    if picture is None:
        return None
    return pb.Preview(media_type=picture.media_type, width=picture.width, height=picture.height, image=picture.image)


def _error(failure: Failure) -> pb.JobError:
    return pb.JobError(code=failure.code, message=failure.message)


def _set_size(message: pb.Job, width: int | None, height: int | None) -> None:
    if width is not None and height is not None:
        message.width, message.height = width, height


def _datetime(stamp: Timestamp) -> datetime | str:
    """The time, or its seconds as text where it lies beyond the calendar."""
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        return str(stamp.seconds)


def _time(milliseconds: int) -> Timestamp:
    time = Timestamp()
    time.FromMilliseconds(milliseconds)
    return time
