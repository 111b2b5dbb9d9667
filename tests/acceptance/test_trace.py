"""Every job is one trace, from the front end's server span to the stages on the worker."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from img2img.client import Client
from tests.stack import DOG, MODEL_PATH, Stack, eventually, submit

STAGES = {"load", "decode", "encode_text", "steps", "encode", "store"}


class Span:
    """What the tests look at, with ids in hexadecimal."""

    def __init__(self, service: str, span: Any) -> None:
        self.service = service
        self.name: str = span.name
        self.kind: int = span.kind
        self.trace = span.trace_id.hex()
        self.id = span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.attributes = {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        with self._lock:
            for resource in request.resource_spans:
                names = {item.key: item.value.string_value for item in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [Span(names["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace_of(self, job_id: str, server_span: str) -> list[Span]:
        """The spans of the trace in which the job was sent, once server, worker and all stages are there."""
        wanted = {server_span, "send default", "process default"} | {f"stage {stage}" for stage in STAGES}

        def look() -> list[Span] | None:
            sent = [s for s in self.spans if s.attributes.get("messaging.message.id") == job_id]
            found = [s for s in self.spans if sent and s.trace == sent[0].trace]
            return found if {span.name for span in found} >= wanted else None

        return eventually(look, f"{wanted} of {job_id}: {[(s.name, s.trace) for s in self.spans]}")


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    receiver = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def traced(
    valkey_url: str, tmp_path: Path, collector: tuple[Collector, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stack]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector[1])
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with Stack(valkey_url, tmp_path) as stack:
        yield stack


def check_one_trace(collector: Collector, job_id: str, server_span: str) -> None:
    """One root, the server's span; everything hangs together; every stage is there."""
    spans = collector.trace_of(job_id, server_span)
    ids = {span.id for span in spans}
    roots = [span for span in spans if span.parent not in ids]
    assert [root.name for root in roots] == [server_span]
    by_name = {span.name: span for span in spans}
    send, process = by_name["send default"], by_name["process default"]
    assert send.parent == roots[0].id
    assert process.parent == send.id
    assert process.links == [(send.trace, send.id)]
    assert (send.service, process.service) == ("img2img-gateway", "img2img-worker")
    stages = {span.name.removeprefix("stage ") for span in spans if span.parent == process.id}
    assert stages >= STAGES
    assert send.attributes["messaging.system"] == process.attributes["messaging.system"] == "arq"


def test_a_rest_job_is_one_trace(traced: Stack, collector: tuple[Collector, str]) -> None:
    """Cloudflare's route and the native one: server span, send, process, stages."""
    traced.worker()
    with traced.gateway().client() as client:
        job_id = submit(client, prompt="a dog", image=list(DOG.read_bytes()), strength=0.5)["id"]
        check_one_trace(collector[0], job_id, "POST /v1/jobs")
        answer = client.post(MODEL_PATH.format(account="local"), json={"prompt": "a dog"})
        route = "POST /client/v4/accounts/{account_id}/ai/run/{model}"
        check_one_trace(collector[0], answer.headers["img2img-job-id"], route)


def test_a_grpc_job_is_one_trace(traced: Stack, collector: tuple[Collector, str]) -> None:
    """Generate: server span, send, process, stages."""
    traced.worker()
    with Client(traced.gateway().grpc) as client:
        picture = client.generate(prompt="a dog")
    check_one_trace(collector[0], picture.job.id, "img2img.v1.Img2ImgService/Generate")


def test_the_callers_trace_goes_on(traced: Stack, collector: tuple[Collector, str]) -> None:
    """A W3C ``traceparent`` that comes in is the trace that everything belongs to."""
    traced.worker()
    trace = "0af7651916cd43dd8448eb211c80319c"
    with traced.gateway().client(headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}) as client:
        job_id = submit(client, prompt="a dog")["id"]
    assert {span.trace for span in collector[0].trace_of(job_id, "POST /v1/jobs")} == {trace}


def test_a_second_attempt_is_linked(traced: Stack, collector: tuple[Collector, str]) -> None:
    """A retry is a trace of its own, linked to where the job was sent; spans say neither prompt nor picture."""
    traced.worker(retry_delay="0.01")
    with traced.gateway().client() as client:
        job_id = submit(client, prompt="a dog fake:fail=1")["id"]

    def spans_of(name: str) -> list[Span]:
        of_job = (s for s in collector[0].spans if s.attributes.get("messaging.message.id") == job_id)
        return [span for span in of_job if span.name == name]

    second = eventually(lambda: spans_of("process default")[1:], "the second attempt's span")[0]
    (sent,) = spans_of("send default")
    assert second.attributes["img2img.attempt"] == 2
    assert second.trace != sent.trace
    assert second.links == [(sent.trace, sent.id)]
    assert not any("fake:fail" in str(value) for span in collector[0].spans for value in span.attributes.values())
