"""The queue server dies or falls silent below running gateways and workers, and comes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.calls import problem
from tests.proxy import Proxy
from tests.stack import Process, Stack, eventually, state_of, submit
from tests.valkey import ValkeyServer

DURABLE = ("appendonly yes", "appendfsync always")
JOBS = 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path / "server", *DURABLE) as server:
        yield server


def test_jobs_outlive_a_killed_server(server: ValkeyServer, tmp_path: Path) -> None:
    """kill -9 with running and queued jobs: after the restart each ends once, and none was run twice."""
    with Stack(server.url, tmp_path, concurrency="4", lease="30") as stack:
        workers = [stack.worker() for _ in range(2)]
        with stack.gateway().client() as client:
            # Long enough that eight run and others wait, unless it takes half a second to submit one.
            jobs = [submit(client, prompt="a dog fake:step=0.2")["id"] for _ in range(JOBS)]
            eventually(lambda: client.get("/v1/queue").json()["running"] > 0, "some run")
            server.kill()
            eventually(lambda: client.get("/v1/queue").status_code == 503, "the gateway knows")
            problem(client.post("/v1/jobs", json={"prompt": "a dog"}), 503, "unavailable")
            server.start()
            server.wait_up()
            for job_id in jobs:
                job = end_of(client, job_id)
                assert (job["state"], job["attempt"]) == ("succeeded", 1)
            log = [types(client, job_id) for job_id in jobs]
    assert [events.count("succeeded") for events in log] == [1] * JOBS
    assert sorted(ends(workers)) == sorted(jobs)


def test_a_silent_network_is_survived(server: ValkeyServer, tmp_path: Path) -> None:
    """Nothing passes and nothing is closed: callers are told in time, and afterwards the job's end is written."""
    with Proxy(server.port) as proxy, Stack(proxy.url, tmp_path, lease="30") as stack:
        workers = [stack.worker()]
        with stack.gateway().client() as client:
            job_id = submit(client, prompt="a dog fake:step=0.1")["id"]
            eventually(lambda: state_of(client, job_id) == "running", "running")
            with proxy.black_hole():
                problem(client.post("/v1/jobs", json={"prompt": "a dog"}, timeout=20), 503, "unavailable")
                answer = client.get("/health/ready")
                assert (answer.status_code, answer.json()) == (503, {"status": "queue server silent"})
            job = end_of(client, job_id)
            assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert ends(workers).count(job_id) == 1


def test_a_full_server_takes_no_job_but_gets_its_results_later(server: ValkeyServer, tmp_path: Path) -> None:
    """Out of memory: calls that need some are 503, the others answered; a finished picture waits for its place."""
    with Stack(server.url, tmp_path) as stack, server.client() as admin:
        workers = [stack.worker()]
        with stack.gateway().client() as client:
            job_id, queued = (submit(client, prompt="a dog fake:step=0.1")["id"] for _ in range(2))
            eventually(lambda: state_of(client, job_id) == "running", "running")
            admin.config_set("maxmemory", 1)
            problem(client.post("/v1/jobs", json={"prompt": "a dog"}), 503, "unavailable")
            eventually(lambda: any(entry["event"] == "blob_retried" for entry in workers[0].entries()), "it is done")
            assert state_of(client, job_id) == "running"
            admin.config_set("maxmemory", 0)
            for job in (end_of(client, job_id), end_of(client, queued)):
                assert (job["state"], job["attempt"]) == ("succeeded", 1)
                assert client.get(job["links"]["image"]).status_code == 200
    assert ends(workers) == [job_id, queued]


def end_of(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job once it has ended."""

    def look() -> dict[str, Any] | None:
        answer = client.get(f"/v1/jobs/{job_id}")
        job: dict[str, Any] = answer.json()
        return job if answer.is_success and job["state"] not in ("queued", "running") else None

    return eventually(look, "the job ends", 60)


def types(client: httpx.Client, job_id: str) -> list[str]:
    """The types of the job's events."""
    lines = client.get(f"/v1/jobs/{job_id}/events").text.splitlines()
    return [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]


def ends(workers: list[Process]) -> list[str]:
    """The jobs whose end was written, as often as it was."""
    return [entry["job"] for worker in workers for entry in worker.entries() if entry.get("event") == "job_ended"]
