"""Every job is a trace from the caller to its stages, or traces that are linked: what a collector gets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from img2img.client import Client
from img2img.v1 import img2img_pb2 as pb
from tests.collector import CLIENT, CONSUMER, PRODUCER, SERVER, Collector, Span, collecting, orphans
from tests.stack import DOG, MODEL_PATH, Gateway, Process, Stack, ended, eventually, submit
from tests.upstream.running import proxy_settings

RUN = MODEL_PATH.format(account="local")
RUN_ROUTE = "POST /client/v4/accounts/{account_id}/ai/run/{model}"
SEND, PROCESS = "send default", "process default"
STAGES = ["load", "decode", "encode_text", "steps", "decode_image", "encode", "store", "finish"]
PROMPT = "a dog that nobody may know of"
SAMPLED = 1
CALLER = "b7ad6b7169203331"
POOLS = """
[[pools]]
name = "first"
engine = "fake"
start_seconds = 1.0

[[pools]]
name = "second"
engine = "fake"

[[routes]]
pools = ["first", "second"]
"""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """A collector, and the variables that have every process of this module export to it."""
    with collecting() as running, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield running


class Traced:
    """A gateway and a worker that export their spans."""

    def __init__(self, stack: Stack) -> None:
        self.worker: Process = stack.worker(retry_delay="0.01")
        self.gateway: Gateway = stack.gateway()


@pytest.fixture(scope="module")
def traced(valkey_url: str, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Traced]:
    with Stack(valkey_url, tmp_path_factory.mktemp("traced")) as stack:
        yield Traced(stack)


@pytest.fixture
def client(traced: Traced) -> Iterator[httpx.Client]:
    with traced.gateway.client() as opened:
        yield opened


def succeeded(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job, when it has ended, and well."""
    job = ended(client, job_id)
    assert job["state"] == "succeeded", job
    return job


def trace_in(told: str) -> tuple[str, str]:
    """Trace and span of a ``traceresponse``."""
    version, trace, span, flags = told.split("-")
    assert (version, len(trace), len(span)) == ("00", 32, 16)
    assert int(flags, 16) & SAMPLED
    return trace, span


def check_one_trace(collector: Collector, job: dict[str, Any], told: str, route: str, remote: str = "") -> list[Span]:
    """One root, the span that the caller was told of; below it all that was done for the job, in its order."""
    trace, server_span = trace_in(told)
    stages = {f"stage {stage}" for stage in STAGES}
    spans = collector.trace(trace, {route, SEND, PROCESS} | stages, remote)
    (root,) = (span for span in spans if span.parent == remote)
    assert (root.name, root.kind, root.id) == (route, SERVER, server_span)
    (send,), (process,) = collector.of_job(job["id"], SEND), collector.of_job(job["id"], PROCESS)
    assert (send.kind, send.parent, send.service) == (PRODUCER, root.id, "img2img-gateway")
    assert (process.kind, process.parent, process.service) == (CONSUMER, send.id, "img2img-worker")
    assert process.links == [(trace, send.id)]
    assert job["trace_id"] == trace
    check_stages([span for span in spans if span.parent == process.id], job["timings"])
    return spans


def check_stages(spans: list[Span], timings: dict[str, float]) -> None:
    """Each begins where the one before it ends, and the job tells the same times as they do."""
    spans.sort(key=lambda span: span.began)
    names = [span.name.removeprefix("stage ") for span in spans]
    assert [name for name in names if name != "encode_image"] == STAGES
    assert [span.began for span in spans[1:]] == [span.ended for span in spans[:-1]]
    assert list(timings) == ["queued", *names]
    for name, span in zip(names[:-1], spans[:-1], strict=True):
        assert timings[name] == pytest.approx((span.ended - span.began) / 1e9, abs=2e-6)


def test_a_rest_job_is_one_trace(client: httpx.Client, collector: Collector) -> None:
    """The native call that returns at once; nothing of what was asked for is in any span."""
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, "image": list(DOG.read_bytes()), "strength": 0.5})
    job = succeeded(client, answer.json()["id"])
    spans = check_one_trace(collector, job, answer.headers["traceresponse"], "POST /v1/jobs")
    (root,) = (span for span in spans if not span.parent)
    assert root.attributes["http.route"] == "/v1/jobs"
    assert root.attributes["http.request.method"] == "POST"
    assert root.attributes["http.response.status_code"] == 202
    assert root.attributes["img2img.job.id"] == job["id"]
    (process,) = collector.of_job(job["id"], PROCESS)
    assert process.attributes["img2img.outcome"] == "succeeded"
    assert process.attributes["img2img.engine"] == "fake/fake"
    assert not [span for span in collector.spans if "nobody may know" in span.text]


def test_a_synchronous_call_is_one_trace(client: httpx.Client, collector: Collector) -> None:
    """Cloudflare's dialect: the server span lasts until the picture is sent."""
    answer = client.post(RUN, json={"prompt": "a dog"})
    job = succeeded(client, answer.headers["img2img-job-id"])
    spans = check_one_trace(collector, job, answer.headers["traceresponse"], RUN_ROUTE)
    (root,) = (span for span in spans if not span.parent)
    (process,) = collector.of_job(job["id"], PROCESS)
    assert root.began < process.began < root.ended


@pytest.mark.parametrize("method", ["Generate", "CreateJob"])
def test_a_grpc_job_is_one_trace(traced: Traced, client: httpx.Client, collector: Collector, method: str) -> None:
    """The caller is told of the span in the trailing metadata, and the job names the trace."""
    with Client(traced.gateway.grpc) as grpc_client:
        stub = grpc_client._stub
        request = getattr(pb, f"{method}Request")(request=pb.Img2ImgRequest(prompt="a dog"))
        answer, call = getattr(stub, method).with_call(request)
        (told,) = (value for key, value in call.trailing_metadata() if key == "traceresponse")
        job = succeeded(client, answer.job.id)
        assert grpc_client.get(answer.job.id).trace_id == job["trace_id"]
    check_one_trace(collector, job, told, f"img2img.v1.Img2ImgService/{method}")


def test_the_callers_trace_goes_on(client: httpx.Client, collector: Collector) -> None:
    """A W3C ``traceparent`` that comes in is the trace that everything belongs to."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
    answer = client.post("/v1/jobs", json={"prompt": "a dog"}, headers=headers)
    assert trace_in(answer.headers["traceresponse"])[0] == trace
    job = succeeded(client, answer.json()["id"])
    check_one_trace(collector, job, answer.headers["traceresponse"], "POST /v1/jobs", remote=CALLER)


def test_a_refused_call_is_told_of_its_trace(traced: Traced, client: httpx.Client, collector: Collector) -> None:
    """An error answer has ``traceresponse``, too, so that it can be asked about."""
    answer = client.post("/v1/jobs", json={})
    assert answer.status_code == 400
    trace, span = trace_in(answer.headers["traceresponse"])
    (root,) = collector.trace(trace, {"POST /v1/jobs"})
    assert (root.id, root.attributes["http.response.status_code"]) == (span, 400)


def test_a_second_attempt_is_linked(client: httpx.Client, collector: Collector) -> None:
    """A retry is a trace of its own, linked to where the job was sent; the attempt before it says why it failed."""
    job = succeeded(client, submit(client, prompt="a dog fake:fail=1")["id"])
    first, second = collector.wait_for(job["id"], PROCESS, 2)
    (sent,) = collector.of_job(job["id"], SEND)
    assert (first.trace, first.parent, first.failed) == (sent.trace, sent.id, True)
    assert (first.attributes["img2img.outcome"], first.attributes["error.type"]) == ("released", "engine_failed")
    assert first.attributes["img2img.released.code"] == "engine_failed"
    assert (second.attributes["img2img.attempt"], second.failed) == (2, False)
    assert (second.trace != sent.trace, second.parent, second.links) == (True, "", [(sent.trace, sent.id)])
    assert job["trace_id"] == sent.trace


def test_the_jobs_of_a_batch_are_linked_to_its_call(client: httpx.Client, collector: Collector) -> None:
    """Each is a trace of its own, so that a slow one can be found and a hundred do not make one trace."""
    answer = client.post(RUN, params={"queueRequest": "true"}, json={"requests": [{"prompt": "a"}, {"prompt": "b"}]})
    call = trace_in(answer.headers["traceresponse"])
    jobs = [succeeded(client, job["id"]) for job in client.get("/v1/jobs", params={"limit": 2}).json()["jobs"]]
    assert len({job["trace_id"] for job in jobs} | {call[0]}) == 3
    for job in jobs:
        spans = collector.trace(job["trace_id"], {SEND, PROCESS, "stage finish"})
        (send,) = collector.of_job(job["id"], SEND)
        assert [span.id for span in spans if not span.parent] == [send.id]
        assert send.links == [call]


def test_what_is_logged_of_a_job_names_it_and_its_trace(traced: Traced, client: httpx.Client) -> None:
    """The lines of gateway and worker alike."""
    job = succeeded(client, submit(client, prompt="a dog fake:fail=1")["id"])
    for process, events in ((traced.gateway, {"job_created"}), (traced.worker, {"job_released", "job_ended"})):

        def lines_of(process: Process = process) -> dict[str, dict[str, Any]]:
            return {entry["event"]: entry for entry in process.entries() if entry.get("job") == job["id"]}

        # A worker logs a job's end after it has told the server.
        eventually(lambda lines_of=lines_of, events=events: lines_of().keys() >= events, f"{events} of {job['id']}")
        lines = [line for event, line in lines_of().items() if event in events]
        assert all(len(line["trace_id"]) == 32 and len(line["span_id"]) == 16 for line in lines)
        assert job["trace_id"] in {line["trace_id"] for line in lines}


def test_a_killed_worker_leaves_nothing_hanging(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    """Its attempt has no span, and so none of that attempt's stages has one; the next attempt is linked."""
    with collecting() as apart:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", apart.url)
        with Stack(valkey_url, tmp_path, queue="crashing", lease="1.5", beat="0.4") as stack:
            dying = stack.worker()
            with stack.gateway().client() as client:
                job_id = submit(client, prompt="a dog fake:crash")["id"]
                dying.wait()
                stack.worker(fake_obeys="false")
                job = succeeded(client, job_id)
    # Everything has ended, and has exported what it had.
    (sent,), (process,) = apart.of_job(job_id, "send crashing"), apart.of_job(job_id, "process crashing")
    assert (job["crashes"], process.attributes["img2img.attempt"]) == (1, 2)
    assert (process.parent, process.links) == ("", [(sent.trace, sent.id)])
    assert not orphans(apart.spans)
    assert {span.parent for span in apart.spans if span.name.startswith("stage ")} == {process.id}


def test_a_job_that_moves_stays_in_its_trace(valkey_url: str, tmp_path: Path, collector: Collector) -> None:
    """Sent to a pool where nobody works, and done in another: the spans say which."""
    file = tmp_path / "pools.toml"
    file.write_text(POOLS)
    with Stack(valkey_url, tmp_path, pools_file=str(file)) as stack, stack.gateway().client() as client:
        job_id = submit(client, prompt="a dog")["id"]
        assert client.get(f"/v1/jobs/{job_id}").json()["pool"] == "first"
        stack.worker(queue="second")
        job = succeeded(client, job_id)
        assert job["pool"] == "second"
        collector.trace(job["trace_id"], {"POST /v1/jobs", "send first", "process second", "stage finish"})
        (sent,), (process,) = collector.of_job(job_id, "send first"), collector.of_job(job_id, "process second")
        assert (process.parent, process.links) == (sent.id, [(sent.trace, sent.id)])


def test_a_service_in_front_of_another_is_one_trace(
    traced: Traced, client: httpx.Client, valkey_url: str, tmp_path: Path, collector: Collector
) -> None:
    """The call upstream carries the trace, and the service that it reaches goes on with it."""
    upstream = proxy_settings(f"{traced.gateway.http}/client/v4", upstream_account="local")
    with Stack(valkey_url, tmp_path, queue="front") as stack, stack.gateway().client() as front:
        stack.worker(**upstream)
        answer = front.post(RUN, json={"prompt": "a dog"})
        assert answer.status_code == 200
        job = succeeded(front, answer.headers["img2img-job-id"])
        trace, _ = trace_in(answer.headers["traceresponse"])
        hops = {"process front", "POST", PROCESS, "stage upstream"}
        spans = collector.trace(trace, hops)
    (process,) = (span for span in spans if span.name == "process front")
    (call,) = (span for span in spans if span.name == "POST")
    assert (call.kind, call.parent, call.service) == (CLIENT, process.id, "img2img-worker")
    assert call.attributes["http.request.method"] == "POST"
    assert call.attributes["http.response.status_code"] == 200
    assert call.attributes["server.address"] == "127.0.0.1"
    assert call.attributes["img2img.upstream.request_id"] == job["result"]["upstream"]["request_id"]
    servers = [span for span in spans if span.kind == SERVER]
    assert sorted(span.parent for span in servers) == ["", call.id]
    (behind,) = (span for span in spans if span.name == PROCESS)
    assert call.began < behind.began < call.ended
