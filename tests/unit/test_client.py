"""Both clients against a real gRPC server whose answers the tests decide."""

import asyncio
import hashlib
import inspect
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from img2img.client import (
    AsyncClient,
    AttemptInfo,
    Client,
    ClientError,
    EtaInfo,
    Event,
    Failure,
    JobInfo,
    JobOptions,
    JobState,
    OutputFormat,
    Sampler,
    Violation,
)
from img2img.images import PictureInfo
from img2img.v1 import img2img_pb2 as pb
from img2img.v1 import img2img_pb2_grpc

PICTURE = bytes(range(256)) * 64
AT = datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC)
LOST = pb.JobError(code="worker_lost", message="gone")
STAMP = Timestamp(seconds=int(AT.timestamp()), nanos=250_000_000)


class Servicer(img2img_pb2_grpc.Img2ImgServiceServicer):
    """Keeps what it was asked, and answers what the test put into ``answers``: messages or statuses."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.answers: dict[str, list[Any]] = {}

    async def _answer(self, method: str, request: Any, context: Any) -> Any:
        self.asked.append(request)
        self.metadata = dict(context.invocation_metadata())
        answers = self.answers[method]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, status_pb2.Status):
            status = rpc_status.to_status(answer)
            await context.abort(status.code, status.details, status.trailing_metadata)
        return answer

    async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("generate", request, context)

    async def CreateJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("create", request, context)

    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("get", request, context)

    async def ListJobs(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("list", request, context)

    async def CancelJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("cancel", request, context)

    async def ReplayJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("replay", request, context)

    async def GetResult(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for message in await self._answer("result", request, context):
            yield message

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for message in await self._answer("watch", request, context):
            if isinstance(message, status_pb2.Status):
                status = rpc_status.to_status(message)
                await context.abort(status.code, status.details, status.trailing_metadata)
            yield message


class Caller:
    """Calls a method of either client, the plain one in a thread."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        function = getattr(self.client, method)
        if isinstance(self.client, AsyncClient):
            if method == "watch":
                return [event async for event in function(*args, **kwargs)]
            return await function(*args, **kwargs)
        if method == "watch":
            return await asyncio.to_thread(lambda: list(function(*args, **kwargs)))
        return await asyncio.to_thread(function, *args, **kwargs)


@pytest.fixture
async def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def server(servicer: Servicer) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 1024 * 1024)])
    img2img_pb2_grpc.add_Img2ImgServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture(params=["sync", "async"])
async def call(request: pytest.FixtureRequest, server: str) -> AsyncIterator[Caller]:
    if request.param == "sync":
        with Client(server, key="secret") as client:
            yield Caller(client)
    else:
        async with AsyncClient(server, key="secret") as aclient:
            yield Caller(aclient)


def job(**fields: Any) -> pb.Job:
    return pb.Job(id="0-1", state=pb.JOB_STATE_SUCCEEDED, create_time=STAMP, expire_time=STAMP, **fields)


def status(code: int, message: str, *details: Any) -> status_pb2.Status:
    found = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        found.details.append(packed)
    return found


def happened(sequence: int, state: pb.JobState = pb.JOB_STATE_RUNNING, **fields: Any) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(sequence=sequence, type="progress", time=STAMP, state=state, attempt=1, **fields)


def chunks(data: bytes, announced: bytes | None = None) -> list[pb.GetResultResponse]:
    result = pb.JobResult(sha256=hashlib.sha256(announced or data).hexdigest())
    parts = [data[start : start + 1000] for start in range(0, len(data), 1000)]
    return [pb.GetResultResponse(result=result), *(pb.GetResultResponse(chunk=part) for part in parts)]


async def test_fields_arrive(call: Caller, servicer: Servicer, tmp_path: Path) -> None:
    """Every field arrives, a path as the file's bytes; what was not given stays absent."""
    (tmp_path / "mask.png").write_bytes(b"mask")
    servicer.answers["create"] = [pb.CreateJobResponse(job=job())]
    await call(
        "create",
        prompt="a lion",
        image=b"image",
        mask=tmp_path / "mask.png",
        strength=0.5,
        num_steps=7,
        guidance=None,
        seed=2**64 - 1,
        idempotency_key="mine",
        options=JobOptions(
            priority=3, sampler=Sampler.EULER_A, output_format=OutputFormat.WEBP, not_before=AT, model="sd"
        ),
    )
    sent = servicer.asked[0]
    assert sent.request == pb.Img2ImgRequest(
        prompt="a lion", image=b"image", mask=b"mask", strength=0.5, num_steps=7, seed=2**64 - 1
    )
    assert (sent.idempotency_key, sent.options.priority) == ("mine", 3)
    assert sent.options.sampler == pb.SAMPLER_EULER_A
    assert sent.options.output_format == pb.OUTPUT_FORMAT_WEBP
    assert (sent.options.not_before, sent.options.model) == (STAMP, "sd")
    assert servicer.metadata["authorization"] == "Bearer secret"


async def test_job_comes_back_plain(call: Caller, servicer: Servicer) -> None:
    """A job is read into plain values, field for field."""
    parameters = pb.Parameters(
        prompt="a lion",
        image=pb.PictureInfo(format="PNG", width=4, height=5, size_bytes=6, sha256="cd"),
        num_steps=20,
        strength=1,
        guidance=7.5,
    )
    message = job(
        attempt=2,
        seed=9,
        parameters=parameters,
        options=pb.JobOptions(priority=1, sampler=pb.SAMPLER_DDIM, not_before=STAMP, model="sd"),
        eta=pb.Eta(p50=STAMP, p90=STAMP),
        crashes=2,
        history=[pb.PastAttempt(attempt=1, worker="w", start_time=STAMP, end_time=STAMP, error=LOST)],
        timings={"queued": 0.5},
        warnings=["cut"],
        error=pb.JobError(code="engine_failed", message="no luck"),
        result=pb.JobResult(
            media_type="image/png",
            width=1,
            height=2,
            size_bytes=3,
            sha256="ab",
            expire_time=STAMP,
            receipt=pb.Receipt(model="m", weights={"unet": "ef"}, steps=4, versions={"torch": "2"}, rows=0),
        ),
        width=256,
        finish_time=STAMP,
    )
    servicer.answers["get"] = [pb.GetJobResponse(job=message)]
    found: JobInfo = await call("get", "0-1", wait=2.5)
    assert servicer.asked[0] == pb.GetJobRequest(id="0-1", wait_seconds=2.5)
    assert (found.id, found.state, found.attempt, found.seed) == ("0-1", JobState.SUCCEEDED, 2, 9)
    assert (found.created_at, found.started_at, found.finished_at) == (AT, None, AT)
    assert found.parameters.prompt == "a lion"
    assert found.parameters.image == PictureInfo("PNG", 4, 5, 6, "cd")
    assert found.parameters.negative_prompt is None
    assert found.options == JobOptions(priority=1, sampler=Sampler.DDIM, not_before=AT, model="sd")
    assert found.eta == EtaInfo(AT, AT)
    assert (found.failures, found.crashes, found.interruptions, found.replays) == (0, 2, 0, 0)
    assert found.history == (AttemptInfo(1, "w", AT, AT, Failure("worker_lost", "gone")),)
    assert (found.timings, found.warnings) == ({"queued": 0.5}, ("cut",))
    assert found.error == Failure("engine_failed", "no luck")
    assert found.result is not None
    assert (found.result.size_bytes, found.result.expires_at) == (3, AT)
    receipt = found.result.receipt
    assert receipt is not None
    assert (receipt.model, receipt.weights, receipt.steps, receipt.versions) == ("m", {"unet": "ef"}, 4, {"torch": "2"})
    assert receipt.rows == 0
    assert (found.width, found.height, found.step) == (256, None, None)


async def test_generate_fetches_a_large_picture(call: Caller, servicer: Servicer) -> None:
    """A picture that the answer leaves out is fetched in chunks."""
    servicer.answers["generate"] = [
        pb.GenerateResponse(job=job(), image=b"small"),
        pb.GenerateResponse(job=job()),
    ]
    servicer.answers["result"] = [chunks(PICTURE)]
    assert (await call("generate", prompt="a lion", timeout=5)).data == b"small"
    assert (await call("generate", prompt="a lion", timeout=5)).data == PICTURE
    first, second = (request.idempotency_key for request in servicer.asked[:2])
    assert first != second


async def test_damaged_picture_is_refused(call: Caller, servicer: Servicer) -> None:
    """A picture that is not the announced one is an error, not a broken file."""
    servicer.answers["result"] = [chunks(PICTURE[:-1], announced=PICTURE)]
    with pytest.raises(ClientError) as caught:
        await call("result", "0-1")
    assert caught.value.code == "data_loss"


async def test_list_pages(call: Caller, servicer: Servicer) -> None:
    """State, size and page go out; the next page's token comes back, None on the last page."""
    servicer.answers["list"] = [
        pb.ListJobsResponse(jobs=[job()], next_page_token="more"),
        pb.ListJobsResponse(jobs=[job()]),
    ]
    page = await call("list", state=JobState.RUNNING, limit=1)
    assert (len(page.jobs), page.next_page) == (1, "more")
    assert servicer.asked[0] == pb.ListJobsRequest(page_size=1, state=pb.JOB_STATE_RUNNING)
    assert (await call("list", page="more")).next_page is None


async def test_errors_carry_the_services_code(call: Caller, servicer: Servicer) -> None:
    """Code, message, field violations and the advised wait are read from the rich status."""
    violation = error_details_pb2.BadRequest.FieldViolation(field="num_steps", description="too many")
    servicer.answers["create"] = [
        status(
            code_pb2.INVALID_ARGUMENT,
            "num_steps: too many",
            error_details_pb2.ErrorInfo(reason="invalid_request", domain="img2img"),
            error_details_pb2.BadRequest(field_violations=[violation]),
        ),
        status(
            code_pb2.RESOURCE_EXHAUSTED,
            "busy",
            error_details_pb2.ErrorInfo(reason="queue_full", domain="img2img", metadata={"eta_seconds": "40.5"}),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        ),
        status(code_pb2.UNIMPLEMENTED, "what?"),
    ]
    with pytest.raises(ClientError, match="num_steps: too many") as caught:
        await call("create", prompt="x")
    assert caught.value.code == "invalid_request"
    assert caught.value.violations == (Violation("num_steps", "too many"),)
    with pytest.raises(ClientError) as caught:
        await call("create", prompt="x")
    assert (caught.value.code, caught.value.retry_after, caught.value.eta_seconds) == ("queue_full", 1.5, 40.5)
    with pytest.raises(ClientError, match=r"what\?") as caught:
        await call("create", prompt="x")
    assert caught.value.code == "unimplemented"


async def test_a_broken_call_is_repeated_with_its_key(call: Caller, servicer: Servicer) -> None:
    """After UNAVAILABLE the same call is made again, under the same idempotency key."""
    gone = status(code_pb2.UNAVAILABLE, "restarting")
    servicer.answers["create"] = [gone, gone, pb.CreateJobResponse(job=job())]
    assert (await call("create", prompt="x", image=PICTURE * 64)).id == "0-1"
    assert len({request.idempotency_key for request in servicer.asked}) == 1
    assert len(servicer.asked) == 3


async def test_watch_goes_on_where_it_broke(call: Caller, servicer: Servicer) -> None:
    """A stream that breaks or just ends is opened again after the last event seen, until the job has ended."""
    gone = status(code_pb2.UNAVAILABLE, "restarting")
    last = happened(4, pb.JOB_STATE_FAILED, error=pb.JobError(code="engine_failed", message="no luck"))
    servicer.answers["watch"] = [
        gone,
        [happened(2, stage="steps", step=1, steps=9), gone],
        [happened(3)],
        [last],
    ]
    events: list[Event] = await call("watch", "0-1", after=1)
    assert [event.sequence for event in events] == [2, 3, 4]
    assert [request.after for request in servicer.asked] == [1, 1, 2, 3]
    assert (events[0].stage, events[0].step, events[0].steps, events[0].at) == ("steps", 1, 9, AT)
    assert events[2].error == Failure("engine_failed", "no luck")


async def test_a_replayed_jobs_log_goes_on(call: Caller, servicer: Servicer) -> None:
    """A terminal event ends the watch only as the stream's last one, and only if the stream was not broken there."""
    gone = status(code_pb2.UNAVAILABLE, "restarting")
    failed, done = happened(2, pb.JOB_STATE_FAILED), happened(4, pb.JOB_STATE_SUCCEEDED)
    servicer.answers["watch"] = [[failed, happened(3, pb.JOB_STATE_QUEUED, replays=1)], [done, gone], []]
    events: list[Event] = await call("watch", "0-1", after=1)
    assert [(event.sequence, event.replays) for event in events] == [(2, None), (3, 1), (4, None)]
    assert [request.after for request in servicer.asked] == [1, 3, 4]


async def test_replay_answers_with_the_job(call: Caller, servicer: Servicer) -> None:
    """The id goes out, the job comes back."""
    servicer.answers["replay"] = [pb.ReplayJobResponse(job=job(replays=3))]
    assert (await call("replay", "0-1")).replays == 3
    assert servicer.asked == [pb.ReplayJobRequest(id="0-1")]


async def test_watch_does_not_insist(call: Caller, servicer: Servicer) -> None:
    """What another try cannot mend is raised at once."""
    info = error_details_pb2.ErrorInfo(reason="job_not_found", domain="img2img")
    servicer.answers["watch"] = [status(code_pb2.NOT_FOUND, "No job", info)]
    with pytest.raises(ClientError) as caught:
        await call("watch", "0-1")
    assert (caught.value.code, len(servicer.asked)) == ("job_not_found", 1)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_no_service(kind: type[Client] | type[AsyncClient], unused_tcp_port: int) -> None:
    """When nobody answers, the error says where."""
    client = kind(f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(ClientError, match=f"No service answers at 127.0.0.1:{unused_tcp_port}") as caught:
        await Caller(client)("get", "0-1")
    assert caught.value.code == "unavailable"
    await Caller(client)("close")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_tls(kind: type[Client] | type[AsyncClient], servicer: Servicer, tmp_path: Path) -> None:
    """With ``ca`` the connection is encrypted and the server's certificate checked."""
    certificate, key = self_signed("localhost")
    (tmp_path / "ca.pem").write_bytes(certificate)
    server = grpc.aio.server()
    img2img_pb2_grpc.add_Img2ImgServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    servicer.answers["get"] = [pb.GetJobResponse(job=job())]
    trusting, distrusting = kind(f"localhost:{port}", ca=tmp_path / "ca.pem"), kind(f"localhost:{port}", tls=True)
    assert (await Caller(trusting)("get", "0-1")).id == "0-1"
    with pytest.raises(ClientError) as caught:
        await Caller(distrusting)("get", "0-1")
    assert caught.value.code == "unavailable"
    for client in (trusting, distrusting):
        await Caller(client)("close")
    await server.stop(None)


def self_signed(host: str) -> tuple[bytes, bytes]:
    """A certificate for ``host`` and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), secret


async def test_cancelling_the_task_cancels_the_call(server: str, servicer: Servicer) -> None:
    """Cancelling ``generate`` reaches the server, which ends the job."""
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def wait(method: str, request: Any, context: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    servicer._answer = wait  # type: ignore[method-assign]
    async with AsyncClient(server) as client:
        task = asyncio.create_task(client.generate(prompt="x"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            await cancelled.wait()


def test_the_clients_are_twins() -> None:
    """Both have the same methods, with the same parameters."""

    def shape(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"}

    assert shape(Client) == shape(AsyncClient)
