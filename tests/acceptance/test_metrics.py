"""What Prometheus sees: a gateway and a worker of each engine, real processes, after real jobs."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import pytest
import redis

from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.metrics import Scrape, metrics_url
from tests.metrics_table import declared, shown_by
from tests.stack import DOG, Gateway, Process, Stack, ended, eventually, state_of, submit
from tests.upstream.running import UpstreamProcess

POOLS: Final = """
[[pools]]
name = "local"
engine = "fake"

[[pools]]
name = "burst"
engine = "cloudflare"
step_price = 0.01
spend_per_day = 20.0
tenant_spend_per_day = 5.0

[[pools]]
name = "gpu"
engine = "diffusion"

[[routes]]
pools = ["local"]

[[routes]]
model = "burst"
pools = ["burst"]

[[routes]]
model = "gpu"
pools = ["gpu"]
"""
ENGINES: Final = {"local": "fake", "burst": "cloudflare", "gpu": "diffusion"}
STATES: Final = ("queued", "delayed", "running", "quarantined")
STEPS: Final = 3
BUSY: Final = "img2img_worker_busy"
TRACES: Final = {pool: digit * 32 for pool, digit in zip((*ENGINES, "rpc", "unsampled"), "abcde", strict=True)}
"""Those in which the callers are that ask for a job of each pool."""
JOB_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7")


def traceparent(whose: str) -> str:
    return f"00-{TRACES[whose]}-b7ad6b7169203331-{'00' if whose == 'unsampled' else '01'}"


class Service:
    """A gateway and a worker in each of three pools, and where each shows its metrics."""

    def __init__(self, stack: Stack, upstream: UpstreamProcess, folder: Path) -> None:
        pools_file = folder / "pools.toml"
        pools_file.write_text(POOLS)
        given = {"pools_file": str(pools_file), "engine": "auto"}
        self.gateway: Gateway = stack.gateway(**given)
        self.workers: dict[str, Process] = {}
        for pool, engine in ENGINES.items():
            own = upstream.settings() if engine == "cloudflare" else {}
            self.workers[pool] = stack.worker(**{**own, **given, "queue": pool, "device": "cpu"})

    def scrape(self, pool: str | None = None) -> Scrape:
        """That of a pool's worker, or of the gateway."""
        return Scrape(self.gateway.http if pool is None else metrics_url(self.workers[pool]))

    def run(self, pool: str, trace: str) -> dict[str, Any]:
        """A job in that pool that has succeeded, asked for in one of the ``TRACES``."""
        options = {} if pool == "local" else {"model": pool}
        with self.gateway.client(headers={"traceparent": traceparent(trace)}) as client:
            made = submit(client, prompt="a dog", image=list(DOG.read_bytes()), num_steps=STEPS, options=options)
            job = ended(client, made["id"])
        assert job["state"] == "succeeded", job
        return job

    def generate(self) -> None:
        """The same over gRPC."""
        with grpc.insecure_channel(self.gateway.grpc) as channel:
            request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt="a dog", num_steps=STEPS))
            metadata = (("traceparent", traceparent("rpc")),)
            Img2ImgServiceStub(channel).Generate(request, metadata=metadata, timeout=60)


@pytest.fixture(scope="module")
def service(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """After a job in each pool, one over gRPC, one in a trace that is not sampled, and a request that was refused."""
    folder = tmp_path_factory.mktemp("service")
    with Stack(valkey_url, folder) as stack, closing(UpstreamProcess(folder / "upstream.log")) as upstream:
        service = Service(stack, upstream, folder)
        for pool in ENGINES:
            service.run(pool, pool)
        service.run("local", "unsampled")
        service.generate()
        with service.gateway.client() as client:
            assert client.post("/v1/jobs", json={"prompt": ""}).status_code == 400
            assert client.get("/v2/jobs").status_code == 404
            assert client.request("PROPFIND", "/v1/jobs").status_code == 405
        # A worker counts a job after it has told the server of its end.
        eventually(lambda: not any(service.scrape(pool).value(BUSY) for pool in ENGINES), "no worker is busy")
        yield service


@pytest.fixture
def server_process(valkey_url: str) -> int:
    with redis.Redis.from_url(valkey_url) as server:
        return int(server.info("server")["process_id"])


def test_every_metric_is_there(service: Service) -> None:
    """Whatever is declared has a value where it belongs, and is unknown elsewhere."""
    gateway, workers = service.scrape(), [service.scrape(pool) for pool in ENGINES]
    sampled = {"gateway": gateway.sampled, "worker": set().union(*(worker.sampled for worker in workers))}
    known = {"gateway": {family.name for family in gateway.families}}
    known["worker"] = {family.name for worker in workers for family in worker.families}
    for metric in declared():
        (family,) = metric.describe()
        places = shown_by(metric)
        assert [place for place in ("gateway", "worker") if family.name in sampled[place]] == places
        assert [place for place in ("gateway", "worker") if family.name in known[place]] == places


def test_a_gateway_counts_what_comes_in(service: Service) -> None:
    """Jobs by front end, refusals by code, requests by route: never by what a caller wrote."""
    scrape = service.scrape()
    assert scrape.value("img2img_jobs_submitted_total", front_end="rest") == len(ENGINES) + 1
    assert scrape.value("img2img_jobs_submitted_total", front_end="grpc") == 1
    assert scrape.value("img2img_jobs_rejected_total", reason="invalid_request") == 1
    accepted = {"route": "/v1/jobs", "method": "POST", "status": "202"}
    assert scrape.value("img2img_http_request_seconds_count", **accepted) == len(ENGINES) + 1
    assert 0 < scrape.value("img2img_http_request_seconds_sum", **accepted) < 60
    waited = scrape.value("img2img_http_request_seconds_count", route="/v1/jobs/{job_id}", method="GET", status="200")
    assert waited == len(ENGINES) + 1
    assert scrape.value("img2img_http_request_seconds_count", route="_OTHER", method="GET", status="404") == 1
    assert scrape.value("img2img_http_request_seconds_count", method="_OTHER", status="405") == 1
    generated = {"method": "img2img.v1.Img2ImgService/Generate", "code": "OK"}
    assert scrape.value("img2img_rpc_request_seconds_count", **generated) == 1
    assert scrape.value("img2img_event_loop_lag_seconds_count") > 0


def test_a_gateway_tells_of_every_pool(service: Service) -> None:
    """Its gauges are what the queue server says at that moment; what has a price has spend and cap, too."""
    scrape = service.scrape()
    assert scrape.value("img2img_queue_up") == 1
    assert [scrape.value("img2img_workers", queue=pool) for pool in ENGINES] == [1, 1, 1]
    spent = {sample.labels["queue"]: sample.value for sample in scrape.samples if sample.name == "img2img_queue_spend"}
    # One call for an input of 512x512.
    assert spent == {"burst": pytest.approx(STEPS * 0.01)}
    assert scrape.value("img2img_queue_spend_cap", queue="burst") == 20


def test_a_gateway_tells_what_waits_and_for_how_long(service: Service) -> None:
    """One job runs and one waits behind it; afterwards there is neither."""
    with service.gateway.client() as client:
        running, waiting = (submit(client, prompt="fake:step=1", num_steps=20)["id"] for _ in range(2))
        eventually(lambda: state_of(client, running) == "running", "the first one runs")
        eventually(lambda: service.scrape("local").value(BUSY) == 1, "its worker knows")
        oldest = "img2img_queue_oldest_job_age_seconds"
        eventually(lambda: service.scrape().value(oldest, queue="local") > 0, "the second one waits")
        scrape = service.scrape()
        states = {state: scrape.value("img2img_queue_jobs", queue="local", state=state) for state in STATES}
        assert states == {"queued": 1, "delayed": 0, "running": 1, "quarantined": 0}
        assert scrape.value("img2img_queue_backlog_seconds", queue="local") > 0
        for job_id in (waiting, running):
            client.post(f"/v1/jobs/{job_id}/cancel")
        eventually(lambda: state_of(client, running) == "canceled", "it has stopped")
        eventually(lambda: service.scrape("local").value(BUSY) == 0, "nothing runs")
        assert service.scrape().value(oldest, queue="local") == 0
    after = service.scrape("local")
    # The other one has never been on a worker.
    assert after.value("img2img_jobs_completed_total", outcome="canceled", engine="fake") == 1
    assert after.value("img2img_jobs_completed_total", outcome="expired", engine="fake") == 0


@pytest.mark.parametrize("pool", ENGINES)
def test_a_worker_counts_its_jobs_and_their_time(service: Service, pool: str) -> None:
    """By outcome, with stages that add up to the whole."""
    scrape, jobs = service.scrape(pool), 3 if pool == "local" else 1
    succeeded = {"outcome": "succeeded"}
    assert scrape.value("img2img_jobs_completed_total", **succeeded, engine=ENGINES[pool]) == jobs
    assert scrape.value("img2img_job_seconds_count", **succeeded) == jobs
    assert 0 < scrape.value("img2img_job_seconds_sum", **succeeded) < 60 * jobs
    assert scrape.value("img2img_job_stage_seconds_count", stage="store") == jobs
    assert scrape.value("img2img_model_load_seconds_count") == 1
    assert scrape.value("img2img_worker_slots") >= 1
    assert scrape.value("process_resident_memory_bytes") > 0
    assert scrape.value("img2img_event_loop_lag_seconds_count") > 0


def test_an_engine_counts_its_passes(service: Service) -> None:
    """Each of the job's steps was a pass of two rows, with guidance and without it."""
    scrape, device = service.scrape("gpu"), {"device": "cpu"}
    passes = scrape.value("img2img_engine_passes_total", **device)
    assert 1 <= passes <= STEPS
    assert scrape.value("img2img_engine_rows_total", **device) == 2 * passes
    assert scrape.value("img2img_batch_rows_bucket", **device, le="2.0") == passes
    assert scrape.value("img2img_batch_rows_bucket", **device, le="1.0") == 0
    assert 0 < scrape.value("img2img_engine_busy_seconds_total", **device) < 60
    assert scrape.value("img2img_engine_memory_bytes", **device) == 0  # it is no GPU


def test_calls_upstream_are_counted(service: Service) -> None:
    """By what became of them; an outcome that there was not is 0, and not absent."""
    scrape = service.scrape("burst")
    assert scrape.value("img2img_upstream_calls_total", outcome="picture") == 1
    assert 0 < scrape.value("img2img_upstream_request_seconds_sum", outcome="picture") < 60
    outcomes = {s.labels["outcome"] for s in scrape.samples if s.name == "img2img_upstream_calls_total"}
    assert {"capacity", "rate", "lost", "denied"} <= outcomes


def test_no_label_names_a_job(service: Service) -> None:
    """Nor an account, nor a path: every job would be a series of its own."""
    for scrape in (service.scrape(), *map(service.scrape, ENGINES)):
        for sample in scrape.samples:
            for value in sample.labels.values():
                assert not JOB_ID.search(value), sample
                assert "/v2" not in value, sample
            assert not {"job", "account", "tenant", "worker"} & sample.labels.keys(), sample


def test_slow_requests_and_jobs_lead_to_their_traces(service: Service) -> None:
    """The caller's trace is an exemplar on both sides of the queue, if it is sampled."""
    gateway = service.scrape()
    assert gateway.traces("img2img_http_request_seconds", route="/v1/jobs") <= {TRACES[pool] for pool in ENGINES}
    assert gateway.traces("img2img_http_request_seconds", route="/v1/jobs")
    assert gateway.traces("img2img_rpc_request_seconds") == {TRACES["rpc"]}
    for pool in ("burst", "gpu"):
        worker = service.scrape(pool)
        assert worker.traces("img2img_job_seconds") == {TRACES[pool]}
        assert worker.traces("img2img_job_stage_seconds") == {TRACES[pool]}
    assert service.scrape("burst").traces("img2img_upstream_request_seconds") == {TRACES["burst"]}
    of_jobs = service.scrape("local").traces("img2img_job_seconds")
    assert of_jobs
    assert of_jobs <= {TRACES["local"], TRACES["rpc"]}


def test_promtool_finds_nothing_wrong(service: Service) -> None:
    """Names, units and types are as Prometheus recommends; this is the plain form, as curl gets it."""
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: apt-get install prometheus"
    for url in (service.gateway.http, *(metrics_url(worker) for worker in service.workers.values())):
        answer = httpx.get(f"{url}/metrics", trust_env=False)
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        checked = subprocess.run([promtool, "check", "metrics"], input=answer.content, capture_output=True, timeout=30)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_without_a_queue_server_the_rest_is_told(service: Service, server_process: int) -> None:
    """A gateway shows what is its own, a worker lives and says why it claims nothing; both recover."""
    probes = metrics_url(service.workers["local"])

    def ready() -> tuple[int, str]:
        answer = httpx.get(f"{probes}/health/ready", trust_env=False)
        return answer.status_code, answer.json()["status"]

    os.kill(server_process, signal.SIGSTOP)
    try:
        scrape = service.scrape()
        assert scrape.value("img2img_queue_up") == 0
        assert scrape.value("img2img_jobs_submitted_total", front_end="grpc") == 1
        assert not [sample for sample in scrape.samples if "queue" in sample.labels]
        eventually(lambda: ready() == (503, "queue server unavailable"), "it is not ready")
        assert httpx.get(f"{probes}/health/live", trust_env=False).json() == {"status": "live"}
    finally:
        os.kill(server_process, signal.SIGCONT)
    eventually(lambda: ready() == (200, "ready"), "it is ready again")
    scrape = service.scrape()
    assert scrape.value("img2img_queue_up") == 1
    assert scrape.value("img2img_queue_jobs", queue="local", state="queued") == 0


def test_a_worker_that_drains_is_not_ready(stack: Stack) -> None:
    """It lives, and shows its metrics, until its last job has ended."""
    worker = stack.worker(queue="draining")
    probes = metrics_url(worker)
    with stack.gateway(queue="draining").client() as client:
        job_id = submit(client, prompt="fake:step=5")["id"]
        eventually(lambda: state_of(client, job_id) == "running", "it runs")
        assert httpx.get(f"{probes}/health/ready", trust_env=False).status_code == 200
        worker.signal(signal.SIGTERM)

        def draining() -> bool:
            return httpx.get(f"{probes}/health/ready", trust_env=False).json() == {"status": "draining"}

        eventually(draining, "it drains")
        assert httpx.get(f"{probes}/health/live", trust_env=False).status_code == 200
        assert Scrape(probes).value(BUSY) == 1
        assert httpx.get(f"{probes}/jobs", trust_env=False).status_code == 404
        client.post(f"/v1/jobs/{job_id}/cancel")
        assert ended(client, job_id)["state"] == "canceled"
    assert worker.wait() == 0


def test_a_lost_claim_is_counted(stack: Stack) -> None:
    """A worker that stood still for longer than its lease finds its job with another one."""
    fast = {"queue": "lost", "lease": "2", "beat": "0.5"}
    with stack.gateway(queue="lost").client() as client:
        slow = stack.worker(**fast)
        job_id = submit(client, prompt="fake:step=0.1", num_steps=20)["id"]
        eventually(lambda: state_of(client, job_id) == "running", "it runs")
        slow.signal(signal.SIGSTOP)
        stack.worker(**fast)
        eventually(lambda: client.get(f"/v1/jobs/{job_id}").json()["attempt"] == 2, "another one has it")
        slow.signal(signal.SIGCONT)
        lost = "img2img_worker_claims_lost_total"
        eventually(lambda: Scrape(metrics_url(slow)).value(lost) == 1, "it has noticed")
