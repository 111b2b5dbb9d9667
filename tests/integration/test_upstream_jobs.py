"""Jobs whose pictures another service makes: what callers see, and what a dead worker's call costs."""

import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from img2img.client import Client
from tests.calls import is_picture, model_error, run_path
from tests.days import PATIENCE, keep_within_a_day
from tests.stack import Gateway, Process, Stack, eventually, state_of, submit
from tests.upstream.api import MODEL, Api
from tests.upstream.running import running_upstream
from tests.upstream.server import Upstream

LABEL = "822b33ad87c1"
"""The first digits of the SHA-256 of "acme"."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with running_upstream(Api({"acme": "secret"})) as running:
        yield running


@pytest.fixture
def api(upstream: Upstream) -> Api:
    upstream.api.reset()
    return upstream.api


@pytest.fixture
def gateway(stack: Stack, upstream: Upstream, api: Api, request: pytest.FixtureRequest) -> Gateway:
    """A gateway on a queue of the test's own."""
    return stack.gateway(queue=request.node.name)


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture(autouse=True)
def _no_accounts_are_parked(valkey_url: str) -> Iterator[None]:
    """What one test has the upstream say of its account must not hold up the next."""
    import redis

    yield
    with redis.Redis(unix_socket_path=valkey_url.removeprefix("unix://").partition("?")[0]) as client:
        for key in client.keys("*upstream-*"):
            client.delete(key)


class Workers:
    """Workers that call the stand-in, on the test's queue."""

    def __init__(self, stack: Stack, upstream: Upstream, queue: str) -> None:
        self._stack, self._upstream, self._queue = stack, upstream, queue

    def start(self, **settings: str) -> Process:
        return self._stack.worker(
            **{
                "queue": self._queue,
                "engine": "cloudflare",
                "upstream_url": self._upstream.url,
                "upstream_account": "acme",
                "upstream_token": "secret",
                "retry_delay": "0.01",
                "lease": "1",
                "beat": "0.3",
                **settings,
            }
        )


@pytest.fixture
def workers(stack: Stack, upstream: Upstream, request: pytest.FixtureRequest) -> Workers:
    return Workers(stack, upstream, request.node.name)


def ended(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/v1/jobs/{job['id']}", params={"wait": 60}).json()
    return found


def test_a_result_names_the_call_that_made_it(gateway: Gateway, http: httpx.Client, workers: Workers, api: Api) -> None:
    """The same on every front end; the account's own id stays here."""
    workers.start()
    job = ended(http, submit(http, prompt="a lion"))
    assert job["state"] == "succeeded", job
    call = {"request_id": api.calls[0].request_id, "account": LABEL, "neurons": 12.5}
    assert job["result"]["upstream"] == call
    assert job["result"]["receipt"]["device"] == "Cloudflare Workers AI"
    assert job["executed_by"].startswith(f"cloudflare/{MODEL} on ")
    assert "upstream" in job["timings"]
    with Client(gateway.grpc) as client:
        result = client.get(job["id"]).result
    assert result is not None
    assert result.upstream is not None
    assert (result.upstream.request_id, result.upstream.account, result.upstream.neurons) == tuple(call.values())
    assert is_picture(http.post(run_path(), json={"prompt": "a tiger"}))


def test_a_refusal_reaches_the_caller_in_the_upstreams_words(http: httpx.Client, workers: Workers, api: Api) -> None:
    workers.start()
    answer = http.post(run_path(), json={"prompt": "upstream:5006"})
    words = model_error(answer, 3030, 400, "model_refused")
    assert "'/num_steps' must be <= 20" in words
    assert len(api.calls) == 1


@pytest.mark.parametrize("on_lost", ["retry", "fail"])
def test_a_worker_dies_in_a_call(http: httpx.Client, workers: Workers, api: Api, on_lost: str) -> None:
    """Nobody knows what was billed: the job runs again and says so, or ends and can be replayed."""
    worker = workers.start(upstream_on_lost=on_lost)
    job = submit(http, prompt="upstream:never=1")
    eventually(lambda: api.calls, "the call")
    worker.kill()
    workers.start(upstream_on_lost=on_lost)
    job = ended(http, job)
    if on_lost == "retry":
        assert job["state"] == "succeeded"
        assert "may have been billed" in job["history"][0]["error"]["message"]
        assert len(api.calls) == 2
        return
    assert (job["state"], job["error"]["code"]) == ("failed", "upstream_unknown")
    assert len(api.calls) == 1
    assert http.post(f"/v1/jobs/{job['id']}/replay").status_code == 200
    assert ended(http, job)["state"] == "succeeded"


def test_a_canceled_job_hangs_up_at_once(http: httpx.Client, workers: Workers, api: Api) -> None:
    workers.start()
    job = submit(http, prompt="upstream:never")
    eventually(lambda: api.calls, "the call")
    http.post(f"/v1/jobs/{job['id']}/cancel")
    assert ended(http, job)["state"] == "canceled"
    eventually(lambda: api.calls[0].ended == "gone", "the connection's end")


def test_when_the_day_is_used_up_the_job_waits_in_the_queue(http: httpx.Client, workers: Workers, api: Api) -> None:
    """At no cost, until midnight; one that comes later is not even started."""
    keep_within_a_day(PATIENCE)
    workers.start()
    patient = submit(http, prompt="upstream:3036")
    waiting = eventually(
        lambda: next((job for job in [http.get(f"/v1/jobs/{patient['id']}").json()] if job["interruptions"]), None),
        "the job is back",
    )
    assert (waiting["state"], waiting["failures"], waiting["interruptions"]) == ("queued", 0, 1)
    assert waiting["history"][0]["error"]["code"] == "upstream_busy"
    hurried = ended(http, submit(http, prompt="a lion", options={"deadline_seconds": 0.9}))
    assert (hurried["state"], hurried["error"]["code"], hurried["attempt"]) == ("expired", "expired", 0)
    assert len(api.calls) == 1


def test_when_the_day_is_used_up_a_job_with_a_deadline_before_midnight_is_told_at_once(
    http: httpx.Client, workers: Workers, api: Api
) -> None:
    """If a worker has taken it by then."""
    keep_within_a_day(PATIENCE)
    workers.start()
    job = ended(http, submit(http, prompt="upstream:3036", options={"deadline_seconds": 30}))
    assert (job["state"], job["error"]["code"]) == ("failed", "upstream_busy")
    assert len(api.calls) == 1


def test_a_stopped_worker_lets_its_call_end(http: httpx.Client, workers: Workers, api: Api) -> None:
    """It drains: the picture that was paid for is not thrown away."""
    worker = workers.start()
    job = submit(http, prompt="upstream:slow:1")
    eventually(lambda: api.calls, "the call")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert state_of(http, job["id"]) == "succeeded"
    assert len(api.calls) == 1


def test_failed_attempts_are_counted_and_end(http: httpx.Client, workers: Workers, api: Api) -> None:
    """Each makes as many calls as it may."""
    workers.start(upstream_max_calls="2", upstream_breaker="100")
    job = ended(http, submit(http, prompt="upstream:html:502"))
    assert (job["state"], job["error"]["code"], job["failures"]) == ("failed", "upstream_failed", 3)
    assert len(api.calls) == 6
