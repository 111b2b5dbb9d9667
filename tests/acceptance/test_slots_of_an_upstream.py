"""A worker takes as many jobs as its upstream takes calls now: real processes and the stand-in of Cloudflare's API."""

import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.calls import model_error, run_path
from tests.days import PATIENCE, keep_within_a_day
from tests.stack import Stack, ended, eventually, state_of, submit
from tests.upstream.running import UpstreamProcess
from worker.engines.cloudflare.gate import FIRST_LIMIT, FIRST_OPEN, READY_JOBS

SELDOM = {"beat": "60", "lease": "180"}
"""A worker's word comes with a beat, or at once; with these an eventual one came at once."""


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[UpstreamProcess]:
    process = UpstreamProcess(tmp_path / "upstream.log")
    yield process
    process.close()


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.gateway().client() as client:
        yield client


def told(client: httpx.Client, **like: Any) -> dict[str, Any]:
    """What the only worker says of itself, as soon as it is ``like`` this."""

    def found() -> dict[str, Any] | None:
        workers = client.get("/v1/queue").json()["workers"]
        return next((worker for worker in workers if like.items() <= worker.items()), None)

    return eventually(found, f"a worker says {like}")  # type: ignore[return-value]


def counts(client: httpx.Client) -> tuple[int, int]:
    """How many jobs wait and run."""
    shown = client.get("/v1/queue").json()
    return shown["queued"], shown["running"]


def test_while_the_upstream_fails_jobs_stay_in_the_queue(
    stack: Stack, client: httpx.Client, upstream: UpstreamProcess
) -> None:
    """The worker says so at once; after the pause it takes one to try, says so at once, and then the others."""
    stack.worker(**upstream.settings(upstream_breaker="1", upstream_max_calls="1", retry_delay="0.1", **SELDOM))
    failing = submit(client, prompt="a lion upstream:html:502=1")
    told(client, slots=0, paused=True)
    waiting = [submit(client, prompt="a lion", seed=seed) for seed in range(4)]
    told(client, paused=False)
    ends = [ended(client, job["id"]) for job in (failing, *waiting)]
    assert [job["state"] for job in ends] == ["succeeded"] * 5
    assert [(job["attempt"], job["interruptions"]) for job in ends] == [(2, 0)] + [(1, 0)] * 4
    failed_at = datetime.fromisoformat(ends[0]["history"][0]["ended_at"])
    first = min(datetime.fromisoformat(job["started_at"]) for job in ends)
    # The breaker opened before the attempt's end was on record; a worker that takes jobs does so within milliseconds.
    assert (first - failed_at).total_seconds() > FIRST_OPEN / 2
    before, probe = upstream.calls()[:2]
    assert probe["at"] - before["at"] >= FIRST_OPEN


def test_no_more_jobs_are_taken_than_calls_and_a_few(
    stack: Stack, client: httpx.Client, upstream: UpstreamProcess
) -> None:
    """After a sign of overload fewer; those that wait do so in the queue."""
    stack.worker(**upstream.settings())
    assert told(client)["slots"] == FIRST_LIMIT + READY_JOBS
    assert ended(client, submit(client, prompt="a lion upstream:3040=1")["id"])["state"] == "succeeded"
    told(client, slots=5 + READY_JOBS, paused=False)
    jobs = [submit(client, prompt="a lion upstream:hold", seed=seed) for seed in range(20)]
    upstream.wait_for(5, ended="waiting")
    eventually(lambda: counts(client)[1] >= 5 + READY_JOBS, "all slots are taken")
    assert counts(client) == (20 - 5 - READY_JOBS, 5 + READY_JOBS)
    assert len(upstream.wait_for(5, ended="waiting")) == 5
    upstream.set("release")
    assert [ended(client, job["id"])["state"] for job in jobs] == ["succeeded"] * 20


def test_the_operators_number_is_the_most(stack: Stack, client: httpx.Client, upstream: UpstreamProcess) -> None:
    stack.worker(**upstream.settings(concurrency="2"))
    assert told(client)["slots"] == 2
    jobs = [submit(client, prompt="a lion upstream:hold", seed=seed) for seed in range(3)]
    upstream.wait_for(2, ended="waiting")
    assert counts(client) == (1, 2)
    upstream.set("release")
    assert [ended(client, job["id"])["state"] for job in jobs] == ["succeeded"] * 3


def test_a_worker_whose_accounts_are_used_up_is_paused(
    stack: Stack, client: httpx.Client, upstream: UpstreamProcess
) -> None:
    """And one that starts then. The service stays ready and lets jobs wait; who will not is told so at once."""
    keep_within_a_day(PATIENCE)
    settings = upstream.settings(upstream_account="used-up", **SELDOM)
    stack.worker(**settings)
    patient = submit(client, prompt="a lion upstream:3036")
    told(client, slots=0, paused=True)
    later = submit(client, prompt="a lion")
    stack.worker(**settings)
    eventually(lambda: client.get("/health/ready").json()["workers"] == 2, "both are known")
    ready = client.get("/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "workers": 2, "paused": 2})
    busy = client.post(run_path(), json={"prompt": "a lion", "options": {"rejectIfBusy": True}})
    model_error(busy, 3040, 429, "no_capacity")
    for job, attempts in ((patient, 1), (later, 0)):
        canceled = client.post(f"/v1/jobs/{job['id']}/cancel").json()
        assert (canceled["state"], canceled["attempt"]) == ("canceled", attempts)
    assert len(upstream.calls()) == 1


def test_a_paused_worker_that_drains_takes_no_more_jobs(
    stack: Stack, client: httpx.Client, upstream: UpstreamProcess
) -> None:
    """It is listed no longer, and what it runs goes on."""
    keep_within_a_day(PATIENCE)
    worker = stack.worker(**upstream.settings(upstream_account="used-up-later"))
    running = submit(client, prompt="a lion upstream:hold")
    upstream.wait_for(1, ended="waiting")
    submit(client, prompt="a lion upstream:3036")
    told(client, slots=0, paused=True)
    worker.signal(signal.SIGTERM)
    eventually(lambda: client.get("/v1/queue").json()["workers"] == [], "nobody takes jobs")
    assert client.get("/health/ready").status_code == 503
    assert state_of(client, running["id"]) == "running"
    upstream.set("release")
    assert worker.wait() == 0
    assert ended(client, running["id"])["state"] == "succeeded"
