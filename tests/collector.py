"""What stands where an OpenTelemetry collector would: a server for OTLP over gRPC that keeps the spans it gets."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.stack import eventually

SERVER, CLIENT, PRODUCER, CONSUMER = (
    trace_pb2.Span.SpanKind.Value(f"SPAN_KIND_{name}") for name in ("SERVER", "CLIENT", "PRODUCER", "CONSUMER")
)


class Span:
    """What the tests look at: ids in hexadecimal, times in nanoseconds since 1970."""

    def __init__(self, service: str, span: Any) -> None:
        self.service = service
        self.name: str = span.name
        self.kind: int = span.kind
        self.trace: str = span.trace_id.hex()
        self.id: str = span.span_id.hex()
        self.parent: str = span.parent_span_id.hex()
        self.began: int = span.start_time_unix_nano
        self.ended: int = span.end_time_unix_nano
        self.failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.attributes = {item.key: _value(item.value) for item in span.attributes}
        self.text = str(span)

    def __repr__(self) -> str:
        return f"{self.service}: {self.name} {self.trace}-{self.id} below {self.parent or 'nothing'}"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets; ``url`` is what goes into ``OTEL_EXPORTER_OTLP_ENDPOINT``."""

    def __init__(self) -> None:
        self.url = ""
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        with self._lock:
            for resource in request.resource_spans:
                names = {item.key: item.value.string_value for item in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [Span(names["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def clear(self) -> None:
        with self._lock:
            self._spans.clear()

    def of_job(self, job_id: str, name: str) -> list[Span]:
        """The spans of that name whose message is the job, oldest first."""
        found = [s for s in self.spans if s.name == name and s.attributes.get("messaging.message.id") == job_id]
        return sorted(found, key=lambda span: span.began)

    def wait_for(self, job_id: str, name: str, count: int = 1) -> list[Span]:
        """So many spans of that name whose message is the job."""

        def look() -> list[Span]:
            found = self.of_job(job_id, name)
            return found if len(found) >= count else []

        return eventually(look, f"{count} spans {name!r} of {job_id}")

    def trace(self, trace: str, wanted: set[str], remote: str = "") -> list[Span]:
        """The spans of a trace, once those ``wanted`` are there and no parent is missing but the ``remote`` one."""

        def look() -> list[Span]:
            found = [span for span in self.spans if span.trace == trace]
            complete = {span.name for span in found} >= wanted and not orphans(found, remote)
            return found if complete else []

        return eventually(look, f"{wanted} of {trace}, with all of their parents")


def orphans(spans: list[Span], remote: str = "") -> list[Span]:
    """Those whose parent is neither among them nor the ``remote`` caller's."""
    ids = {"", remote} | {span.id for span in spans}
    return [span for span in spans if span.parent not in ids]


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
