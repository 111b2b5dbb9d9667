"""Jobs that one pool cannot do go to another, within what may leave and what it may cost: real processes.

`local` is a pool of fake workers; `burst` calls the stand-in of Cloudflare's API, and each call has a price. What that
saw counts: every prompt says whose job it is.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from img2img.overview import PoolOverview, overview
from img2img.pools import Pools
from img2img.server import open_redis
from img2img.spending import ALL, Spending
from tests.calls import bearer, write_tenants
from tests.days import keep_within_a_day
from tests.stack import Process, Stack, ended, eventually, state_of, submit
from tests.upstream.running import UpstreamProcess

FAST_LEASE: Final = {"lease": "1.5", "beat": "0.4"}
STEPS: Final = 10
PRICE: Final = 0.1
"""Of a call: STEPS times the pool's ``step_price``."""
POOLS: Final = """
[[pools]]
name = "local"
engine = "fake"
start_seconds = 1.0

[[pools]]
name = "burst"
engine = "cloudflare"
start_seconds = 1.0
step_price = 0.01
spend_per_day = {cap}
tenant_spend_per_day = {cap}

[[routes]]
pools = ["local", "burst"]
"""
CALLS: Final = 10
"""How many the pool's cap allows."""
CALLS_OF_POOR: Final = 3
TENANTS: Final = ("free", "home", "poor")
MORE: Final = {"home": 'residency = "local"', "poor": f"spend_per_day = {PRICE * CALLS_OF_POOR:g}"}
A_MINUTE: Final = 60.0


class Service:
    """The two pools with a gateway; workers are started and killed by the test."""

    def __init__(self, stack: Stack, upstream: UpstreamProcess, redis_url: str, folder: Path, cap: float) -> None:
        self._stack, self._upstream, self._redis_url = stack, upstream, redis_url
        self._pools_file = folder / "pools.toml"
        self._pools_file.write_text(POOLS.format(cap=cap))
        # With refuse_late a deadline that a pool's backlog makes unlikely would be refused, and not kept waiting.
        self._gateway = stack.gateway(
            pools_file=str(self._pools_file), tenants_file=tenants_file(folder), refuse_late="false"
        )
        self.jobs: dict[str, list[str]] = {tenant: [] for tenant in TENANTS}
        self._clients = {tenant: self._gateway.client(headers=bearer(tenant)) for tenant in TENANTS}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def local_worker(self) -> Process:
        more = {"pools_file": str(self._pools_file), "queue": "local", "fake_step_seconds": "0.02", **FAST_LEASE}
        return self._stack.worker(**more)

    def burst_worker(self) -> Process:
        more = {"pools_file": str(self._pools_file), "queue": "burst", "retry_delay": "0.2", **FAST_LEASE}
        return self._stack.worker(**self._upstream.settings(**more))

    def submit(self, tenant: str, count: int, **options: Any) -> list[str]:
        """So many jobs of the tenant, all of which are taken; each has a prompt of its own."""
        jobs = self.jobs[tenant]
        for _ in range(count):
            prompt = f"a lion for {tenant}, number {len(jobs)}"
            jobs.append(submit(self._clients[tenant], prompt=prompt, num_steps=STEPS, options=options)["id"])
        return jobs[-count:]

    def states(self, tenant: str, ids: list[str] | None = None) -> list[str]:
        return [state_of(self._clients[tenant], job_id) for job_id in self.jobs[tenant] if not ids or job_id in ids]

    def all_ended(self) -> list[dict[str, Any]]:
        """Every job that was taken, when all of them have ended."""
        return [self.ended(tenant, job_id) for tenant in TENANTS for job_id in self.jobs[tenant]]

    def ended(self, tenant: str, job_id: str) -> dict[str, Any]:
        """A job when it has ended, as its tenant sees it."""
        return ended(self._clients[tenant], job_id)

    def job(self, tenant: str, job_id: str) -> dict[str, Any]:
        """A job as its tenant sees it now."""
        answer: httpx.Response = self._clients[tenant].get(f"/v1/jobs/{job_id}")
        job: dict[str, Any] = answer.raise_for_status().json()
        return job

    def moves(self, tenant: str, job_id: str) -> list[tuple[str, str]]:
        """From where to where the job went while it waited."""
        log = self._clients[tenant].get(f"/v1/jobs/{job_id}/events").raise_for_status().text
        found = re.findall(r'"pool":"(\w+)","moved":\{"from":"(\w+)"', log)
        return [(before, after) for after, before in found]

    def pool(self, name: str) -> PoolOverview:
        return next(pool for pool in asyncio.run(self._overview()) if pool.pool == name)

    async def _overview(self) -> list[PoolOverview]:
        async with open_redis(self._redis_url) as redis:
            return await overview(redis, Pools.load(self._pools_file))


def tenants_file(folder: Path) -> str:
    """Three accounts, of which ``home`` stays here and ``poor`` pays for a few calls only."""
    path = Path(write_tenants(folder / "tenants.toml", *TENANTS))
    text = path.read_text()
    for tenant, line in MORE.items():
        text = text.replace(f'account = "{tenant}"\n', f'account = "{tenant}"\n{line}\n')
    path.write_text(text)
    return str(path)


async def spent_in_burst(redis_url: str) -> dict[str, float]:
    async with open_redis(redis_url) as redis:
        spending = Spending(redis)
        return await spending.of("burst", await spending.today())


def callers(upstream: UpstreamProcess) -> Counter[str]:
    """For whose jobs how many calls came in, by what their prompts say."""
    prompts = (call["fields"]["prompt"] for call in upstream.calls() if call["fields"])
    return Counter(prompt.removeprefix("a lion for ").partition(",")[0] for prompt in prompts)


@pytest.fixture(autouse=True)
def _all_on_one_day() -> None:
    """What may be spent is counted anew at 00:00 UTC."""
    keep_within_a_day(2 * A_MINUTE)


@pytest.fixture(autouse=True)
def _empty(valkey_url: str) -> None:
    """Nothing spent, no account parked, no time measured by the test before."""

    async def flush() -> None:
        async with open_redis(valkey_url) as redis:
            await redis.flushall()

    asyncio.run(flush())


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[UpstreamProcess]:
    process = UpstreamProcess(tmp_path / "upstream.log", "--delay", "0.2")
    yield process
    process.close()


@pytest.fixture
def service(
    stack: Stack, upstream: UpstreamProcess, valkey_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Service]:
    """With a cap of ``CALLS`` calls a day, unless the test asks for another (indirect parametrization)."""
    running = Service(stack, upstream, valkey_url, tmp_path, getattr(request, "param", PRICE * CALLS))
    yield running
    running.close()


def test_a_pool_dies_under_load(service: Service, upstream: UpstreamProcess, valkey_url: str) -> None:
    """Its jobs go outside, but for those that may not leave and those that would cost too much; these wait.

    Every job ends, and what the upstream saw, what the jobs tell and what was spent are the same.
    """
    dying = service.local_worker()
    service.burst_worker()
    for tenant, count in {"poor": 12, "home": 12, "free": CALLS - CALLS_OF_POOR - 1}.items():
        service.submit(tenant, count)
    eventually(lambda: "succeeded" in service.states("home"), "the local pool is at work")
    dying.kill()
    service.submit("poor", 12)
    service.submit("home", 12)
    # What is left of the pool's cap is more than the others want so far: this is the tenant's own.
    eventually(lambda: callers(upstream)["poor"] == CALLS_OF_POOR, "burst makes what the tenant pays for")
    service.submit("free", 12)
    upstream.wait_for(CALLS, ended="answered")
    assert not set(service.states("home")) & {"failed", "expired"}
    service.local_worker()
    jobs = service.all_ended()
    assert {job["state"] for job in jobs} == {"succeeded"}
    calls = upstream.calls()
    assert [call["status"] for call in calls] == [200] * CALLS
    called = Counter(call["fields"]["prompt"] for call in calls)
    assert callers(upstream) == {"free": CALLS - CALLS_OF_POOR, "poor": CALLS_OF_POOR}
    made_outside = [job for job in jobs if job["executed_by"].startswith("cloudflare/")]
    assert Counter(job["parameters"]["prompt"] for job in made_outside) == called
    assert {job["pool"] for job in made_outside} == {"burst"}
    assert all(job["executed_by"].startswith("fake/") == (job["pool"] == "local") for job in jobs)
    spent = asyncio.run(spent_in_burst(valkey_url))
    assert spent.pop(ALL) == pytest.approx(PRICE * CALLS)
    assert spent == pytest.approx({tenant: PRICE * count for tenant, count in callers(upstream).items()})


@pytest.mark.parametrize("service", [1000 * PRICE], indirect=True, ids=["rich"])
@pytest.mark.parametrize("how", ["overloaded", "killed"])
def test_every_pool_is_dead(service: Service, upstream: UpstreamProcess, how: str) -> None:
    """Jobs are taken and wait; those with a short deadline end, the others are done when one pool is back."""
    local, burst = service.local_worker(), service.burst_worker()
    service.submit("free", 1)
    service.all_ended()
    upstream.set("reset")  # where that job was done is no matter here
    if how == "overloaded":
        upstream.set("script", orders=["3040"])
    else:
        burst.kill()
    local.kill()
    pressed = service.submit("free", 3, deadline_seconds=6.0)
    pressed_at_home = service.submit("home", 3, deadline_seconds=6.0)
    patient = {tenant: service.submit(tenant, 4) for tenant in TENANTS}
    for job_id in pressed_at_home:
        assert service.ended("home", job_id)["state"] == "expired"
    for job_id in pressed:
        job = service.ended("free", job_id)
        # The upstream may say before the deadline that it takes no call in time.
        assert job["state"] == "expired" or (how, job["error"]["code"]) == ("overloaded", "upstream_busy")
    for tenant, ids in patient.items():
        assert set(service.states(tenant, ids)) <= {"queued", "running"}
    assert {call["code"] for call in upstream.calls()} == ({3040} if how == "overloaded" else set())
    assert "home" not in callers(upstream)
    service.local_worker()
    done = [service.ended(tenant, job_id) for tenant, ids in patient.items() for job_id in ids]
    assert {job["state"] for job in done} == {"succeeded"}
    assert all(job["executed_by"].startswith("fake/") for job in done)


def test_a_job_comes_back(service: Service, upstream: UpstreamProcess, valkey_url: str) -> None:
    """What went outside while its pool was dead, and cannot be done there today, is done here when that recovers.

    Nothing is spent: no call made a picture.
    """
    upstream.set("script", orders=["3036"])
    service.burst_worker()
    (job_id,) = service.submit("free", 1)
    upstream.wait_for(1, code=3036)
    eventually(lambda: service.pool("burst").delayed == 1, "the job waits for the upstream's next day")
    assert service.job("free", job_id)["pool"] == "burst"
    service.local_worker()
    job = service.ended("free", job_id)
    assert (job["state"], job["pool"]) == ("succeeded", "local")
    assert job["executed_by"].startswith("fake/")
    assert service.moves("free", job_id) == [("local", "burst"), ("burst", "local")]
    assert [call["code"] for call in upstream.calls()] == [3036]
    assert set(asyncio.run(spent_in_burst(valkey_url)).values()) <= {0.0}
