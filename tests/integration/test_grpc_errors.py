"""What the gRPC front end answers to what it cannot do: statuses, and google.rpc details that programs read."""

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc import StatusCode
from grpc_gateway import Gateway, Refusal, fresh_settings, open_gateway, refusal_of

from gateway.rpc.errors import MAX_TEXT, QUOTAS, STATUS, to_status
from gateway.service import JobService
from img2img import errors
from img2img.embedded import EmbeddedValkey
from img2img.errors import Img2ImgError, most_specific
from img2img.jobs import Job
from img2img.settings import Settings
from img2img.v1 import img2img_pb2 as pb

METHOD = "/img2img.v1.Img2ImgService/"
UNKNOWN_ID = "0-01a20538-4234-7181-b3a3-ebf04ad63ab3"
STREAMS = ("WatchJob", "GetResult")


@pytest.fixture
async def gateway(valkey_url: str) -> AsyncIterator[Gateway]:
    """A gateway without a worker; what is refused never becomes a job."""
    async with open_gateway(fresh_settings(valkey_url), worker=False) as opened:
        yield opened


async def refused(gateway: Gateway, method: str, request: Message) -> Refusal:
    call: Any = getattr(gateway.stub, method)(request)
    return await refusal_of(call.read() if method in STREAMS else call)


def create(options: dict[str, Any] | None = None, key: str = "", **fields: Any) -> pb.CreateJobRequest:
    return pb.CreateJobRequest(
        request=pb.Img2ImgRequest(**fields), options=pb.JobOptions(**options or {}), idempotency_key=key
    )


def tree(kind: type[Img2ImgError] = Img2ImgError) -> list[type[Img2ImgError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_the_table_covers_every_error(kind: type[Img2ImgError]) -> None:
    """Each class has its own entry or a base's; only the root's own entry is the root's."""
    nearest = next(base for base in kind.__mro__ if base in STATUS)
    assert nearest is not Img2ImgError or kind is Img2ImgError
    assert most_specific(STATUS, kind) is STATUS[nearest]
    assert set(QUOTAS) <= set(tree())


WRONG_REQUESTS = [
    (pb.CreateJobRequest(), "invalid_request", "prompt"),
    (create(prompt=""), "invalid_request", "prompt"),
    (create(prompt="a dog", width=100), "invalid_request", "width"),
    (create(prompt="a dog", num_steps=21), "invalid_request", "num_steps"),
    (create(prompt="a dog", strength=math.nan), "invalid_request", "strength"),
    (create(prompt="a dog", guidance=math.inf), "invalid_request", "guidance"),
    (create(prompt="a dog", image=b""), "invalid_image", "image"),
    (create(prompt="a dog", image=b"no picture"), "invalid_image", "image"),
    (create(prompt="a dog", image_b64="?"), "invalid_request", "image_b64"),
    (create(prompt="a dog", mask=b"\x89PNG"), "invalid_request", "mask"),
    (create({"priority": 11}, prompt="a dog"), "invalid_request", "options.priority"),
    (create({"deadline_seconds": math.nan}, prompt="a dog"), "invalid_request", "options.deadline_seconds"),
    (create({"sampler": 99}, prompt="a dog"), "invalid_request", "options.sampler"),
    (create({"output_quality": 0}, prompt="a dog"), "invalid_request", "options.output_quality"),
    (create({"not_before": Timestamp(seconds=2**62)}, prompt="a dog"), "invalid_request", "options.not_before"),
    (create({"not_before": Timestamp(seconds=-(2**62))}, prompt="a dog"), "invalid_request", "options.not_before"),
    (create({"not_before": Timestamp(nanos=-1)}, prompt="a dog"), "invalid_request", "options.not_before"),
    (create(prompt="a dog", key="k" * 256), "invalid_request", "idempotency_key"),
]


@pytest.mark.parametrize(("request_", "reason", "field"), WRONG_REQUESTS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("method", ["CreateJob", "Generate"])
async def test_a_wrong_field_is_named(
    gateway: Gateway, method: str, request_: pb.CreateJobRequest, reason: str, field: str
) -> None:
    """INVALID_ARGUMENT, with the field and what is wrong with it, by both ways of making a job."""
    kind = pb.GenerateRequest if method == "Generate" else pb.CreateJobRequest
    answer = await refused(gateway, method, kind.FromString(request_.SerializeToString()))
    assert (answer.code, answer.reason, answer.fields) == (StatusCode.INVALID_ARGUMENT, reason, [field])
    (violation,) = answer.details[error_details_pb2.BadRequest].field_violations
    assert violation.description == answer.message


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("GetJob", pb.GetJobRequest(id=UNKNOWN_ID, wait_seconds=-1), "wait_seconds"),
        ("GetJob", pb.GetJobRequest(id=UNKNOWN_ID, wait_seconds=math.nan), "wait_seconds"),
        ("ListJobs", pb.ListJobsRequest(page_size=1000), "page_size"),
        ("ListJobs", pb.ListJobsRequest(page_size=-1), "page_size"),
        ("ListJobs", pb.ListJobsRequest(page_token="page 2"), "page_token"),
        ("ListJobs", pb.ListJobsRequest(state=99), "state"),
        ("WatchJob", pb.WatchJobRequest(id=UNKNOWN_ID, after=-1), "after"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_arguments_out_of_range_are_named(gateway: Gateway, method: str, request_: Message, field: str) -> None:
    """Nothing is quietly replaced by what might have been meant."""
    answer = await refused(gateway, method, request_)
    assert (answer.code, answer.reason, answer.fields) == (StatusCode.INVALID_ARGUMENT, "invalid_request", [field])


@pytest.mark.parametrize("job_id", [UNKNOWN_ID, "no id", "", "\n\0{0}*", "ü" * 50_000], ids=lambda value: value[:10])
@pytest.mark.parametrize("method", ["GetJob", "WatchJob", "CancelJob", "ReplayJob", "GetResult"])
async def test_a_job_that_does_not_exist(gateway: Gateway, method: str, job_id: str) -> None:
    """NOT_FOUND, whatever the id looks like; a long one is not sent back whole."""
    answer = await refused(gateway, method, getattr(pb, f"{method}Request")(id=job_id))
    assert (answer.code, answer.reason) == (StatusCode.NOT_FOUND, "job_not_found")
    assert len(answer.message.encode()) <= MAX_TEXT


async def test_a_picture_that_is_not_there_yet(gateway: Gateway) -> None:
    """The result of a queued job is refused until the job has succeeded."""
    job = (await gateway.stub.CreateJob(create(prompt="a dog"))).job
    answer = await refused(gateway, "GetResult", pb.GetResultRequest(id=job.id))
    assert (answer.code, answer.reason) == (StatusCode.FAILED_PRECONDITION, "result_not_ready")


async def test_a_picture_past_its_retention(valkey_url: str) -> None:
    """The job is still there and says so."""
    async with open_gateway(fresh_settings(valkey_url, result_retention=0.001)) as gateway:
        job = (await gateway.stub.CreateJob(create(prompt="a dog"))).job
        ended = (await gateway.stub.GetJob(pb.GetJobRequest(id=job.id, wait_seconds=60))).job
        assert ended.state == pb.JOB_STATE_SUCCEEDED
        answer = await refused(gateway, "GetResult", pb.GetResultRequest(id=job.id))
        assert (answer.code, answer.reason) == (StatusCode.NOT_FOUND, "result_gone")


@pytest.mark.parametrize(("timeout", "days"), [(30, 1), (None, 2)])
async def test_nobody_waits_for_a_job_that_begins_too_late(gateway: Gateway, timeout: float | None, days: int) -> None:
    """``Generate`` refuses a job that begins after its caller's deadline, or after a job's longest age."""
    later = datetime.now(UTC) + timedelta(days=days)
    request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt="a dog"), options=pb.JobOptions(not_before=later))
    answer = await refusal_of(gateway.stub.Generate(request, timeout=timeout))
    assert (answer.code, answer.reason) == (StatusCode.INVALID_ARGUMENT, "invalid_request")
    assert answer.fields == ["options.not_before"]
    assert not (await gateway.stub.ListJobs(pb.ListJobsRequest())).jobs


async def test_no_free_worker(gateway: Gateway) -> None:
    """``reject_if_busy`` is a quota that is used up, and tells when to try again."""
    answer = await refused(gateway, "CreateJob", create({"reject_if_busy": True}, prompt="a dog"))
    assert (answer.code, answer.reason) == (StatusCode.RESOURCE_EXHAUSTED, "no_capacity")
    assert answer.details[error_details_pb2.RetryInfo].retry_delay.ToMilliseconds() > 0
    (violation,) = answer.details[error_details_pb2.QuotaFailure].violations
    assert violation.subject == "free workers"


@pytest.mark.parametrize("method", ["CreateJob", "WatchJob"])
async def test_a_message_that_cannot_be_decoded(gateway: Gateway, method: str) -> None:
    """It is the caller's mistake, on unary and streaming methods alike."""
    call: Any = (gateway.channel.unary_stream if method in STREAMS else gateway.channel.unary_unary)(METHOD + method)
    answer = await refusal_of(call(b"\xff\xff").read() if method in STREAMS else call(b"\xff\xff"))
    assert (answer.code, answer.reason) == (StatusCode.INVALID_ARGUMENT, "malformed_body")


async def test_an_unknown_method(gateway: Gateway) -> None:
    """gRPC's own answer."""
    answer = await refusal_of(gateway.channel.unary_unary(METHOD + "Fly")(b""))
    assert answer.code == StatusCode.UNIMPLEMENTED


async def test_a_message_above_the_limit(valkey_url: str) -> None:
    """gRPC refuses it before a method runs, without details, but says both sizes."""
    async with open_gateway(fresh_settings(valkey_url, max_grpc_message=1024), worker=False) as gateway:
        answer = await refused(gateway, "CreateJob", create(prompt="a dog", image=bytes(2048)))
        assert answer.code == StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in answer.message
        assert "1024" in answer.message


class BrokenService(JobService):
    """A service with a mistake in it."""

    async def get(self, account: str, job_id: str, wait: float = 0.0) -> Job:
        raise RuntimeError(f"the secret of {account}")

    async def result(self, account: str, job_id: str) -> Any:
        raise RuntimeError(f"the secret of {account}")


@pytest.mark.parametrize("method", ["GetJob", "GetResult"])
async def test_an_unexpected_error_tells_nothing(valkey_url: str, method: str) -> None:
    """INTERNAL with a general message."""
    settings = fresh_settings(valkey_url)
    async with open_gateway(settings, worker=False, make_service=BrokenService) as gateway:
        answer = await refused(gateway, method, getattr(pb, f"{method}Request")(id=UNKNOWN_ID))
        assert (answer.code, answer.reason) == (StatusCode.INTERNAL, "internal")
        assert "secret" not in answer.message


async def test_the_queue_server_is_away(tmp_path: Path) -> None:
    """UNAVAILABLE, with the advice to try again."""
    async with AsyncExitStack() as server:
        valkey = await server.enter_async_context(EmbeddedValkey(tmp_path, durable=False))
        async with open_gateway(Settings(redis_url=valkey.url, grpc_port=0), worker=False) as gateway:
            await server.aclose()
            for method in ("GetJob", "GetResult"):
                answer = await refused(gateway, method, getattr(pb, f"{method}Request")(id=UNKNOWN_ID))
                assert (answer.code, answer.reason) == (StatusCode.UNAVAILABLE, "unavailable")
                assert answer.details[error_details_pb2.RetryInfo].retry_delay.seconds == 1


def test_an_error_fits_into_headers() -> None:
    """Clients refuse headers above 8 KiB; the longest answer stays below."""
    error = errors.InvalidRequest("ü" * 9999, "ü" * 9999)
    assert len(to_status(error).SerializeToString()) * 4 / 3 + MAX_TEXT * 3 < 8192
