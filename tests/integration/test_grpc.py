"""Every method of ``Img2ImgService``, over a real port, with a worker that runs the fake engine."""

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_gateway import (
    FOREVER,
    Gateway,
    events_of,
    fresh_settings,
    only_job,
    open_gateway,
    refusal_of,
    started,
)
from PIL import Image

from gateway.rpc import servicer
from img2img.settings import Settings
from img2img.v1 import img2img_pb2 as pb


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return fresh_settings(valkey_url)


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    async with open_gateway(settings) as opened:
        yield opened


@pytest.fixture
async def idle_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """A gateway without a worker: jobs stay queued."""
    async with open_gateway(settings, worker=False) as opened:
        yield opened


async def create(gateway: Gateway, prompt: str, **options: object) -> pb.Job:
    request = pb.CreateJobRequest(request=pb.Img2ImgRequest(prompt=prompt), options=pb.JobOptions(**options))
    return (await gateway.stub.CreateJob(request)).job


async def finished(gateway: Gateway, job_id: str) -> pb.Job:
    return (await gateway.stub.GetJob(pb.GetJobRequest(id=job_id, wait_seconds=60))).job


async def result_of(gateway: Gateway, job_id: str) -> tuple[pb.JobResult, bytes]:
    first, *rest = [message async for message in gateway.stub.GetResult(pb.GetResultRequest(id=job_id))]
    assert first.WhichOneof("content") == "result"
    assert {message.WhichOneof("content") for message in rest} == {"chunk"}
    return first.result, b"".join(message.chunk for message in rest)


def noise(side: int) -> bytes:
    """A PNG that compression cannot shrink."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(file, "PNG")
    return file.getvalue()


async def test_a_job_from_creation_to_picture(gateway: Gateway) -> None:
    """A created job can be watched to its end, shows what was asked for, and its picture can be read."""
    request = pb.Img2ImgRequest(prompt="a lion", negative_prompt="", height=256, width=320, num_steps=2, seed=2**63)
    options = pb.JobOptions(priority=0, sampler=pb.SAMPLER_EULER_A, output_format=pb.OUTPUT_FORMAT_WEBP)
    created = (await gateway.stub.CreateJob(pb.CreateJobRequest(request=request, options=options))).job
    assert created.parameters.HasField("negative_prompt")
    assert not created.parameters.HasField("image")
    assert created.seed == 2**63

    events = await events_of(gateway.stub, created.id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events if event.type != "progress"] == ["queued", "running", "succeeded"]
    assert [event.state for event in events[:2]] == [pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING]
    assert {event.attempt for event in events[1:]} == {1}
    progress = [event for event in events if event.type == "progress"]
    assert progress[0].stage == "encode_text"

    job = await finished(gateway, created.id)
    assert job.state == pb.JOB_STATE_SUCCEEDED
    assert (job.width, job.height) == (320, 256)
    assert job.options.sampler == pb.SAMPLER_EULER_A
    assert job.executed_by.startswith("fake/fake on ")
    assert not job.HasField("step")
    assert not job.HasField("error")
    created_at, expires_at = job.create_time.ToMilliseconds(), job.expire_time.ToMilliseconds()
    assert created_at <= job.start_time.ToMilliseconds() <= job.finish_time.ToMilliseconds() < expires_at
    assert job.timings["steps"] >= 0

    result, data = await result_of(gateway, job.id)
    assert result == job.result
    assert result.media_type == "image/webp"
    assert result.size_bytes == len(data)
    assert result.sha256 == hashlib.sha256(data).hexdigest()
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size) == ("WEBP", (320, 256))


async def test_generate_answers_with_the_picture(gateway: Gateway) -> None:
    """``Generate`` waits and brings the picture along; warnings tell what was changed in the request."""
    request = pb.Img2ImgRequest(prompt="a lion", image=noise(64), width=260, strength=0.5, guidance=0.0)
    response = await gateway.stub.Generate(pb.GenerateRequest(request=request))
    assert response.job.state == pb.JOB_STATE_SUCCEEDED
    assert response.job.parameters.image.format == "PNG"
    assert response.job.parameters.guidance == 0.0
    assert list(response.job.warnings) == ["width 260 was rounded to 264, a multiple of 8"]
    assert response.job.result.sha256 == hashlib.sha256(response.image).hexdigest()
    assert await result_of(gateway, response.job.id) == (response.job.result, response.image)


async def test_a_large_picture_is_left_out_and_read_in_chunks(gateway: Gateway) -> None:
    """Clients refuse messages above 4 MiB: such a picture comes through ``GetResult``."""
    request = pb.Img2ImgRequest(prompt="a lion", image=noise(1280), strength=0.05, width=1280, height=1280)
    response = await gateway.stub.Generate(pb.GenerateRequest(request=request))
    assert response.job.result.size_bytes > servicer.INLINE_BYTES
    assert response.image == b""
    result, data = await result_of(gateway, response.job.id)
    assert result.sha256 == hashlib.sha256(data).hexdigest()


async def test_an_idempotency_key_finds_the_first_job(gateway: Gateway) -> None:
    """The same key and request answer with the same job on either method; another request is refused."""
    request = pb.Img2ImgRequest(prompt="a lion")
    first = await gateway.stub.Generate(pb.GenerateRequest(request=request, idempotency_key="one"))
    again = await gateway.stub.Generate(pb.GenerateRequest(request=request, idempotency_key="one"))
    created = await gateway.stub.CreateJob(pb.CreateJobRequest(request=request, idempotency_key="one"))
    assert again == first
    assert created.job == first.job
    other = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt="a tiger"), idempotency_key="one")
    refused = await refusal_of(gateway.stub.Generate(other))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "idempotency_conflict")


async def test_get_job_waits_for_the_end(idle_gateway: Gateway) -> None:
    """``wait_seconds`` answers when the job ends, here by being canceled."""
    job = await create(idle_gateway, "a lion")
    waiting = asyncio.ensure_future(finished(idle_gateway, job.id))
    assert (await idle_gateway.stub.CancelJob(pb.CancelJobRequest(id=job.id))).job.state == pb.JOB_STATE_CANCELED
    ended = await waiting
    assert ended.state == pb.JOB_STATE_CANCELED
    assert ended.error.code == "canceled"


async def test_jobs_are_listed_in_pages(idle_gateway: Gateway) -> None:
    """Newest first, in pages that neither miss nor repeat a job, and by state."""
    stub = idle_gateway.stub
    ids = [(await create(idle_gateway, f"lion {number}")).id for number in range(5)]
    await stub.CancelJob(pb.CancelJobRequest(id=ids[1]))
    pages = [await stub.ListJobs(pb.ListJobsRequest(page_size=2))]
    while token := pages[-1].next_page_token:
        pages.append(await stub.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token)))
    assert [job.id for page in pages for job in page.jobs] == ids[::-1]
    assert len((await stub.ListJobs(pb.ListJobsRequest())).jobs) == 5
    canceled = await stub.ListJobs(pb.ListJobsRequest(state=pb.JOB_STATE_CANCELED))
    assert [job.id for job in canceled.jobs] == [ids[1]]
    assert (await stub.GetJob(pb.GetJobRequest(id=ids[4]))).job.queue_position == 3


async def test_watching_resumes_after_a_sequence_number(gateway: Gateway) -> None:
    """From any event on, the stream goes on as if it had never been broken, attempts included."""
    job = await create(gateway, "fake:fail=1")
    events = await events_of(gateway.stub, job.id)
    assert [event.type for event in events if event.type != "progress"] == [
        "queued", "running", "queued", "running", "succeeded",
    ]  # fmt: skip
    retried = next(event for event in events[1:] if event.type == "queued")
    assert retried.error.code == "engine_failed"
    assert {event.attempt for event in events if event.sequence > retried.sequence} == {2}
    for after in range(len(events) + 2):
        assert await events_of(gateway.stub, job.id, after) == events[after:]


async def test_a_watcher_that_goes_is_forgotten(gateway: Gateway) -> None:
    """When the client ends the stream, the gateway no longer listens for the job."""
    job = await create(gateway, FOREVER)
    await started(gateway.stub, job.id)
    while await gateway.parts.queue.redis.pubsub_channels(gateway.parts.queue.bell(job.id)):
        pass
    await gateway.stub.CancelJob(pb.CancelJobRequest(id=job.id))


async def test_a_drained_gateway_sends_its_watchers_away(gateway: Gateway) -> None:
    """They learn that the job goes on, and resume on another gateway."""
    job = await create(gateway, FOREVER)
    await started(gateway.stub, job.id)

    async def watch() -> None:
        async for _ in gateway.stub.WatchJob(pb.WatchJobRequest(id=job.id)):
            gateway.service.drain()

    refused = await refusal_of(watch())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "unavailable")
    await gateway.stub.CancelJob(pb.CancelJobRequest(id=job.id))


async def test_cancel_stops_a_running_job_and_may_be_repeated(gateway: Gateway) -> None:
    """A running job ends ``canceled``; cancelling it again, or a finished one, changes nothing."""
    job = await create(gateway, FOREVER)
    await started(gateway.stub, job.id)
    await gateway.stub.CancelJob(pb.CancelJobRequest(id=job.id))
    assert (await events_of(gateway.stub, job.id))[-1].error.code == "canceled"
    again = (await gateway.stub.CancelJob(pb.CancelJobRequest(id=job.id))).job
    assert again == await finished(gateway, job.id)


async def test_cancelling_generate_cancels_its_job(gateway: Gateway) -> None:
    """Nobody else waits for it, so it stops at once."""
    call = gateway.stub.Generate(pb.GenerateRequest(request=pb.Img2ImgRequest(prompt=FOREVER)))
    job = await only_job(gateway.stub)
    await started(gateway.stub, job.id)
    call.cancel()
    assert (await finished(gateway, job.id)).state == pb.JOB_STATE_CANCELED


async def test_cancelling_generate_cancels_a_queued_job(idle_gateway: Gateway) -> None:
    """The same before a worker took it."""
    call = idle_gateway.stub.Generate(pb.GenerateRequest(request=pb.Img2ImgRequest(prompt="a lion")))
    job = await only_job(idle_gateway.stub)
    call.cancel()
    assert (await finished(idle_gateway, job.id)).state == pb.JOB_STATE_CANCELED


async def test_a_job_outlives_one_of_two_callers(gateway: Gateway) -> None:
    """While another call waits for the same job, cancelling one leaves it alone."""
    request = pb.GenerateRequest(
        request=pb.Img2ImgRequest(prompt="fake:step=0.05", num_steps=20), idempotency_key="shared"
    )
    leaving = gateway.stub.Generate(request)
    job = await only_job(gateway.stub)
    staying = gateway.stub.Generate(request)
    await started(gateway.stub, job.id)
    leaving.cancel()
    assert (await staying).job.id == job.id


@pytest.mark.parametrize("worker", [True, False], ids=["running", "queued"])
async def test_the_callers_deadline_is_the_jobs(settings: Settings, worker: bool) -> None:
    """When the deadline comes the caller gets DEADLINE_EXCEEDED, and the job ends ``expired``."""
    async with open_gateway(settings, worker=worker) as gateway:
        request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt=FOREVER))
        refused = await refusal_of(gateway.stub.Generate(request, timeout=0.5))
        assert refused.code == grpc.StatusCode.DEADLINE_EXCEEDED
        job = await finished(gateway, (await only_job(gateway.stub)).id)
        assert job.state == pb.JOB_STATE_EXPIRED
        lifetime = job.expire_time.ToMilliseconds() - job.create_time.ToMilliseconds()
        assert lifetime <= 510  # each side rounds up to its clock's next tick


async def test_the_jobs_own_deadline_ends_generate(gateway: Gateway) -> None:
    """``deadline_seconds`` works without a deadline on the call; the answer names the job."""
    request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt=FOREVER), options=pb.JobOptions(deadline_seconds=0.2))
    refused = await refusal_of(gateway.stub.Generate(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "expired")
    job_id = refused.details[error_details_pb2.ErrorInfo].metadata["job_id"]
    assert (await finished(gateway, job_id)).state == pb.JOB_STATE_EXPIRED


async def test_generate_tells_that_somebody_canceled_its_job(gateway: Gateway) -> None:
    """A job canceled through ``CancelJob`` answers its waiting caller with CANCELLED."""
    call = gateway.stub.Generate(pb.GenerateRequest(request=pb.Img2ImgRequest(prompt=FOREVER)))
    job = await only_job(gateway.stub)
    await gateway.stub.CancelJob(pb.CancelJobRequest(id=job.id))
    refused = await refusal_of(call)
    assert (refused.code, refused.reason) == (grpc.StatusCode.CANCELLED, "canceled")


@pytest.mark.parametrize(
    ("prompt", "code", "reason"),
    [
        ("fake:refuse", grpc.StatusCode.INVALID_ARGUMENT, "model_refused"),
        ("fake:fail", grpc.StatusCode.INTERNAL, "engine_failed"),
    ],
)
async def test_generate_tells_why_its_job_failed(
    gateway: Gateway, prompt: str, code: grpc.StatusCode, reason: str
) -> None:
    """The status follows the job's error code; the job keeps the same error."""
    refused = await refusal_of(gateway.stub.Generate(pb.GenerateRequest(request=pb.Img2ImgRequest(prompt=prompt))))
    assert (refused.code, refused.reason) == (code, reason)
    job = await finished(gateway, refused.details[error_details_pb2.ErrorInfo].metadata["job_id"])
    assert (job.error.code, job.error.message) == (reason, refused.message)
