"""The gRPC server around the methods: keys, health, reflection, TLS, traces, and its end."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from grpc_gateway import FOREVER, Gateway, events_of, fresh_settings, only_job, open_gateway, refusal_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from opentelemetry.trace import StatusCode as SpanStatus

from gateway.tenants import Tenants
from img2img.client import AsyncClient
from img2img.errors import ConfigurationError
from img2img.settings import Settings
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import bearer, write_tenants

SERVICE = "img2img.v1.Img2ImgService"
NOT_SERVING, SERVING = (health_pb2.HealthCheckResponse.ServingStatus.Value(n) for n in ("NOT_SERVING", "SERVING"))
NEW_CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
    "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
)


@pytest.fixture
async def gateway(valkey_url: str) -> AsyncIterator[Gateway]:
    async with open_gateway(fresh_settings(valkey_url), worker=False) as opened:
        yield opened


@pytest.fixture
async def shared(valkey_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway with a worker and the accounts "acme" and "umbrella"."""
    tenants = Tenants.load(Path(write_tenants(tmp_path / "tenants.toml", "acme", "umbrella")))
    async with open_gateway(fresh_settings(valkey_url), tenants=tenants) as opened:
        yield opened


def as_account(account: str) -> tuple[tuple[str, str], ...]:
    return tuple(bearer(account).items())


def new_job(prompt: str = "a lion") -> pb.CreateJobRequest:
    return pb.CreateJobRequest(request=pb.Img2ImgRequest(prompt=prompt))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "missing_credentials"),
        ((("authorization", "Basic YTpi"),), "missing_credentials"),
        ((("authorization", "Bearer wrong"),), "unauthenticated"),
    ],
)
async def test_every_method_needs_a_key(shared: Gateway, metadata: tuple[tuple[str, str], ...], reason: str) -> None:
    """Without a key that is known the answer is UNAUTHENTICATED, from unary and streaming methods."""
    for method in pb.DESCRIPTOR.services_by_name["Img2ImgService"].methods:
        call = getattr(shared.stub, method.name)(getattr(pb, f"{method.name}Request")(), metadata=metadata)
        answer = await refusal_of(call.read() if method.server_streaming else call)
        assert (method.name, answer.code, answer.reason) == (method.name, StatusCode.UNAUTHENTICATED, reason)


async def test_accounts_do_not_see_each_other(shared: Gateway) -> None:
    """Another account's job is not found by any method, and not listed."""
    stub, mine, theirs = shared.stub, as_account("acme"), as_account("umbrella")
    job = (await stub.CreateJob(new_job(), metadata=mine)).job
    await stub.GetJob(pb.GetJobRequest(id=job.id, wait_seconds=60), metadata=mine)
    for method in pb.DESCRIPTOR.services_by_name["Img2ImgService"].methods:
        request = getattr(pb, f"{method.name}Request")
        if "id" not in request.DESCRIPTOR.fields_by_name:
            continue
        call = getattr(stub, method.name)(request(id=job.id), metadata=theirs)
        answer = await refusal_of(call.read() if method.server_streaming else call)
        assert (answer.code, answer.reason) == (StatusCode.NOT_FOUND, "job_not_found")
    assert not (await stub.ListJobs(pb.ListJobsRequest(), metadata=theirs)).jobs
    assert [found.id for found in (await stub.ListJobs(pb.ListJobsRequest(), metadata=mine)).jobs] == [job.id]


async def test_calls_at_the_same_time_keep_their_accounts(shared: Gateway) -> None:
    """Twenty interleaved calls of two accounts each make their own account's job."""
    accounts = ["acme", "umbrella"] * 10
    calls = [shared.stub.CreateJob(new_job(), metadata=as_account(account)) for account in accounts]
    created = [(await call).job.id for call in calls]
    for account in ("acme", "umbrella"):
        listed = await shared.stub.ListJobs(pb.ListJobsRequest(), metadata=as_account(account))
        expected = {job_id for job_id, owner in zip(created, accounts, strict=True) if owner == account}
        assert {job.id for job in listed.jobs} == expected


async def test_health_follows_the_gateway_and_needs_no_key(shared: Gateway) -> None:
    """``Check`` answers for the whole server and for our service, and knows no other."""
    stub = health_pb2_grpc.HealthStub(shared.channel)
    for expected in (SERVING, NOT_SERVING):
        shared.rpc.set_serving(expected == SERVING)
        for service in ("", SERVICE):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status == expected
    answer = await refusal_of(stub.Check(health_pb2.HealthCheckRequest(service="other")))
    assert answer.code == StatusCode.NOT_FOUND


async def test_health_tells_every_watcher(gateway: Gateway) -> None:
    """Each hears of every change, also after another one has left."""
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    first, second = (stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)) for _ in range(2))
    assert [(await first.read()).status, (await second.read()).status] == [SERVING, SERVING]
    gateway.rpc.set_serving(False)
    assert [(await first.read()).status, (await second.read()).status] == [NOT_SERVING, NOT_SERVING]
    first.cancel()
    gateway.rpc.set_serving(True)
    assert (await second.read()).status == SERVING


async def test_the_end_tells_watchers_of_health(valkey_url: str) -> None:
    """A server that stops says so, and does not wait for them."""
    async with AsyncExitStack() as after:
        async with open_gateway(fresh_settings(valkey_url, drain_timeout=600.0), worker=False) as gateway:
            channel = await after.enter_async_context(grpc.aio.insecure_channel(gateway.address))
            call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await call.read()).status == SERVING
            watching = asyncio.ensure_future(_rest(call))
        assert await watching == ([NOT_SERVING], StatusCode.UNAVAILABLE)


async def _rest(call: Any) -> tuple[list[int], StatusCode]:
    statuses = []
    try:
        while True:
            statuses.append((await call.read()).status)
    except grpc.aio.AioRpcError as exc:
        return statuses, exc.code()


async def test_calls_in_flight_are_finished(valkey_url: str) -> None:
    """A server that stops lets ``Generate`` answer."""
    async with open_gateway(fresh_settings(valkey_url)) as gateway:
        request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt="fake:step=0.02"))
        call = gateway.stub.Generate(request)
        await only_job(gateway.stub)
        response, _ = await asyncio.gather(call, gateway.rpc.server.stop(60))
        assert response.job.state == pb.JOB_STATE_SUCCEEDED


async def test_connections_grow_old_and_calls_do_not_notice(
    valkey_url: str, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that clients come to new gateways, too: no call fails, and a stream lasts as long as its job."""
    monkeypatch.setattr("gateway.rpc.server.CONNECTION_SECONDS", 0.2)
    async with open_gateway(fresh_settings(valkey_url)) as gateway, AsyncClient(gateway.address) as client:
        job_id = (await client.create(prompt=FOREVER)).id
        watching = gateway.stub.WatchJob(pb.WatchJobRequest(id=job_id))
        events = aiter(watching)
        first = await anext(events)
        connections: set[Any] = set()
        while len(connections) < 10:  # of two channels
            await client.get(job_id)
            await gateway.stub.GetJob(pb.GetJobRequest(id=job_id))
            connections |= {attributes_of(span)["network.peer.port"] for span in all_server_spans(spans)}
            spans.clear()
        await client.cancel(job_id)
        rest = [event.type async for event in events]
        assert (first.type, rest[-1], await watching.code()) == ("queued", "canceled", StatusCode.OK)


async def test_messages_share_one_budget_with_http_bodies(gateway: Gateway) -> None:
    """A large message is refused while others hold the budget; what a call has submitted is given back."""
    large = pb.Img2ImgRequest(prompt="x", negative_prompt="x" * 100_000)
    with gateway.budgets.reserve(None) as other:
        other.hold(gateway.budgets.large.limit // 2 - 100_000)
        refused = await refusal_of(gateway.stub.CreateJob(pb.CreateJobRequest(request=large)))
        assert (refused.code, refused.reason) == (StatusCode.RESOURCE_EXHAUSTED, "too_many_bytes_in_flight")
        call = gateway.stub.Generate(pb.GenerateRequest(request=pb.Img2ImgRequest(prompt=FOREVER)))
        await only_job(gateway.stub)
    assert (await refusal_of(gateway.stub.CreateJob(pb.CreateJobRequest(request=large)))).reason == "invalid_request"
    assert gateway.budgets.large.in_use == 0
    while gateway.budgets.small.in_use:
        await gateway.stub.ListJobs(pb.ListJobsRequest())
    assert not call.done()
    call.cancel()


async def test_calls_that_watch_hold_nothing(gateway: Gateway) -> None:
    """Fields that nobody knows make a message as long as its sender likes, and a watch may last for as long."""
    created = await gateway.stub.CreateJob(pb.CreateJobRequest(request=pb.Img2ImgRequest(prompt=FOREVER)))
    watched = gateway.stub.WatchJob(pb.WatchJobRequest(id=created.job.id))
    await watched.read()
    waiting = gateway.stub.GetJob(pb.GetJobRequest(id=created.job.id, wait_seconds=60))
    async with asyncio.timeout(30):
        while gateway.budgets.small.in_use:
            await gateway.stub.ListJobs(pb.ListJobsRequest())
    assert not watched.done()
    assert not waiting.done()
    watched.cancel()
    waiting.cancel()


async def test_a_call_without_a_message(gateway: Gateway) -> None:
    """A client that closes its side at once is told what is missing."""
    call = gateway.channel.stream_unary(f"/{SERVICE}/GetJob")()
    await call.done_writing()
    refused = await refusal_of(call)
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "malformed_body")


async def test_reflection_lists_the_service(shared: Gateway) -> None:
    """Tools find the service and its messages, without a key."""
    stub = reflection_pb2_grpc.ServerReflectionStub(shared.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    services, file = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in services.list_services_response.service}
    assert names >= {SERVICE, "grpc.health.v1.Health"}
    assert file.file_descriptor_response.file_descriptor_proto[0] == pb.DESCRIPTOR.serialized_pb


async def test_a_port_in_use_is_named(gateway: Gateway, valkey_url: str) -> None:
    """A second gateway on the same port does not start, and says which setting to change."""
    taken = Settings(redis_url=valkey_url, grpc_port=gateway.rpc.port)
    with pytest.raises(ConfigurationError, match="IMG2IMG_GRPC_PORT"):
        async with open_gateway(taken, worker=False):
            pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    return new_certificate(tmp_path_factory.mktemp("tls"))


def new_certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [*NEW_CERTIFICATE.split(), "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def test_tls(valkey_url: str, certificate: tuple[Path, Path]) -> None:
    """With a certificate the port speaks TLS, and only that."""
    cert, key = certificate
    async with open_gateway(fresh_settings(valkey_url, tls_cert=cert, tls_key=key), worker=False) as gateway:
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{gateway.rpc.port}", credentials) as channel:
            stub: Any = Img2ImgServiceStub(channel)
            assert (await stub.CreateJob(new_job())).job.id
        answer = await refusal_of(gateway.stub.CreateJob(new_job()))
        assert answer.code == StatusCode.UNAVAILABLE


async def test_a_wrong_certificate_is_named(valkey_url: str, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """A missing file, text, or a key that is not the certificate's, is a mistake in the settings."""
    cert, _ = certificate
    _, other_key = new_certificate(tmp_path)
    missing, text = tmp_path / "missing.pem", tmp_path / "text.pem"
    text.write_text("no key")
    for key, message in (
        (missing, "IMG2IMG_TLS_KEY.*missing.pem"), (other_key, "its own"), (text, "one of them is no PEM"),
    ):  # fmt: skip
        settings = fresh_settings(valkey_url, tls_cert=cert, tls_key=key)
        with pytest.raises(ConfigurationError, match=message):
            async with open_gateway(settings, worker=False):
                pass


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans that end during the test. A process can have one provider only, so it is shared."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter
    exporter.shutdown()


def server_spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Server spans by method."""
    return {span.name.removeprefix(f"{SERVICE}/"): span for span in all_server_spans(exporter)}


def all_server_spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.kind == SpanKind.SERVER]


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_every_call_is_a_span(shared: Gateway, spans: InMemorySpanExporter) -> None:
    """Unary and streaming calls continue the caller's trace, and the job's own spans hang below; health has none."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (*as_account("acme"), ("traceparent", parent))
    job = (await shared.stub.CreateJob(new_job(), metadata=metadata)).job
    async for _ in shared.stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=metadata):
        pass
    await refusal_of(shared.stub.GetJob(pb.GetJobRequest(id="none"), metadata=metadata))
    await health_pb2_grpc.HealthStub(shared.channel).Check(health_pb2.HealthCheckRequest())
    found = server_spans(spans)
    assert found.keys() == {"CreateJob", "WatchJob", "GetJob"}
    assert {trace.format_trace_id(span.get_span_context().trace_id) for span in found.values()} == {
        parent.split("-")[1]
    }
    codes = {name: attributes_of(span)["rpc.response.status_code"] for name, span in found.items()}
    assert codes == {"CreateJob": "OK", "WatchJob": "OK", "GetJob": "NOT_FOUND"}
    created = found["CreateJob"]
    assert attributes_of(created)["rpc.method"] == f"{SERVICE}/CreateJob"
    assert attributes_of(created)["network.peer.address"] == "127.0.0.1"
    sent = next(span for span in spans.get_finished_spans() if span.name == "send default")
    assert sent.parent is not None
    assert sent.parent.span_id == created.get_span_context().span_id


async def test_a_job_keeps_the_trace_and_no_baggage(gateway: Gateway) -> None:
    """What callers send beside the trace is neither stored nor handed to workers."""
    metadata = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), ("baggage", "user=secret"))
    job = (await gateway.stub.CreateJob(new_job(), metadata=metadata)).job
    stored = (await gateway.parts.queue.get(job.id, "local")).spec.trace
    assert list(stored) == ["traceparent"]
    assert stored["traceparent"].split("-")[1] == "a" * 32


async def test_spans_tell_cancelled_and_late_calls_apart(gateway: Gateway, spans: InMemorySpanExporter) -> None:
    """A call that ran into its deadline is an error; one whose caller went away is not."""
    request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt=FOREVER))
    await refusal_of(gateway.stub.Generate(request, timeout=0.1))
    late = (await only_job(gateway.stub)).id
    await events_of(gateway.stub, late)
    while "Generate" not in server_spans(spans):
        await only_job(gateway.stub)
    span = server_spans(spans)["Generate"]
    assert (attributes_of(span)["rpc.response.status_code"], span.status.status_code) == (
        "DEADLINE_EXCEEDED",
        SpanStatus.ERROR,
    )
    spans.clear()
    call = gateway.stub.Generate(request)
    while (job := await only_job(gateway.stub)).id == late:
        pass
    call.cancel()
    await gateway.stub.GetJob(pb.GetJobRequest(id=job.id, wait_seconds=60))
    while "Generate" not in server_spans(spans):
        await only_job(gateway.stub)
    span = server_spans(spans)["Generate"]
    assert (attributes_of(span)["rpc.response.status_code"], span.status.status_code) == ("CANCELLED", SpanStatus.UNSET)
