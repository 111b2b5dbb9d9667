"""Many users of one queue: nobody waits for another's flood, nobody starves, and the queue takes what it may."""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from arq.connections import ArqRedis

from img2img.client import AsyncClient, ClientError
from img2img.jobs import JobState
from img2img.queue import JobQueue
from img2img.server import open_redis
from tests.queue.calls import submit as submit_to_queue
from tests.stack import Stack, ended, eventually, state_of, submit

FLOOD, ROOM, CALLERS = 5000, 500, 800
BRIEF = {"prompt": "a dog fake:step=0.05", "num_steps": 1}


async def flood(redis: ArqRedis) -> list[str]:
    """As many jobs of one account as nobody can wait for; their ids in the order in which they will run."""
    queue = JobQueue(redis)
    ids = []
    for _ in range(FLOOD // 100):
        ids += await asyncio.gather(
            *(submit_to_queue(queue, 3600.0, account="flood", fields=BRIEF) for _ in range(100))
        )
    return sorted(ids)


async def test_a_small_tenant_behind_a_flood(stack: Stack, valkey_url: str) -> None:
    """With 5,000 jobs of another account queued, a job starts after at most one of those on each worker."""
    async with open_redis(valkey_url) as redis:
        ids = await flood(redis)
        workers = [stack.worker() for _ in range(2)]
        gateway = stack.gateway()
        async with httpx.AsyncClient(base_url=gateway.http, trust_env=False, timeout=60) as client:
            made = (await client.post("/v1/jobs", json=BRIEF)).json()
            job = (await client.get(made["links"]["self"], params={"wait": 30})).json()
        assert job["state"] == "succeeded"
        created, started = (
            datetime.fromisoformat(job[name]).timestamp() * 1000 for name in ("created_at", "started_at")
        )
        queue = JobQueue(redis)
        between = 0
        for job_id in ids:
            other = await queue.get(job_id)
            if other.started_at is None:
                continue
            between += created < other.started_at < started
            if other.state == JobState.RUNNING and other.started_at > started:
                break
        assert between <= len(workers)
        for worker in workers:
            worker.kill()
        await redis.flushall()


def test_low_priority_is_not_starved(stack: Stack) -> None:
    """However many urgent jobs keep coming, a patient one has its turn when they have used up their head start."""
    stack.worker()
    with stack.gateway(priority_seconds="0.1").client() as client:
        submit(client, **BRIEF)
        patient = submit(client, **BRIEF, options={"priority": -10})["id"]
        urgent = [submit(client, **BRIEF, options={"priority": 10})["id"] for _ in range(3)]

        def has_ended() -> bool:
            if sum(state_of(client, job_id) == "queued" for job_id in urgent[-3:]) < 2:
                urgent.extend(submit(client, **BRIEF, options={"priority": 10})["id"] for _ in range(3))
            return state_of(client, patient) == "succeeded"

        eventually(has_ended, "the patient job has its turn")
        for job_id in urgent:
            client.post(f"/v1/jobs/{job_id}/cancel")


async def test_exactly_as_many_as_there_is_room_for(stack: Stack, valkey_url: str) -> None:
    """800 callers at once over both front ends, room for 500: 500 are accepted, all others told when to come again."""
    gateway = stack.gateway(max_queued=str(ROOM))
    limits = httpx.Limits(max_connections=100)
    async with (
        httpx.AsyncClient(base_url=gateway.http, trust_env=False, timeout=60, limits=limits) as http,
        AsyncClient(gateway.grpc) as grpc,
    ):

        async def by_rest() -> str:
            answer = await http.post("/v1/jobs", json=BRIEF)
            if answer.status_code == 202:
                return "accepted"
            assert int(answer.headers["retry-after"]) >= 1
            return f"{answer.status_code} {answer.json()['code']}"

        async def by_grpc() -> str:
            try:
                await grpc.create(prompt="a dog", num_steps=1)
            except ClientError as exc:
                return f"429 {exc.code}"
            return "accepted"

        answers = await asyncio.gather(*(call() for _ in range(CALLERS // 2) for call in (by_rest, by_grpc)))
    assert answers.count("accepted") == ROOM
    assert answers.count("429 queue_full") == CALLERS - ROOM
    async with open_redis(valkey_url) as redis:
        assert (await JobQueue(redis).stats()).queued == ROOM
        await redis.flushall()


def test_a_deferred_job(stack: Stack) -> None:
    """It is shown as queued until its time, outlives the workers that come and go, and then runs."""
    first = stack.worker()
    with stack.gateway().client() as client:
        start = datetime.now(UTC) + timedelta(seconds=1.5)
        deferred = submit(client, **BRIEF, options={"not_before": start.isoformat()})
        for_days = submit(client, **BRIEF, options={"not_before": (start + timedelta(days=5)).isoformat()})
        first.kill()
        stack.worker()
        job = ended(client, deferred["id"])
        assert job["state"] == "succeeded"
        assert datetime.fromisoformat(job["started_at"]) >= start
        assert state_of(client, for_days["id"]) == "queued"
        assert client.get("/v1/queue").json()["delayed"] == 1
        assert client.post(f"{for_days['links']['cancel']}").json()["state"] == "canceled"


def test_a_deadline_behind_too_much_work(stack: Stack) -> None:
    """Once it is known how long jobs take, one that cannot be done in time is refused at once, with an ETA."""
    stack.worker()
    with stack.gateway().client() as client:
        for _ in range(3):
            done = submit(client, **BRIEF)
            assert ended(client, done["id"])["state"] == "succeeded"
        waiting = [submit(client, **BRIEF)["id"] for _ in range(100)]
        refused = client.post("/v1/jobs", json=BRIEF | {"options": {"deadline_seconds": 0.2}})
        assert (refused.status_code, refused.json()["code"]) == (429, "deadline_unreachable")
        assert refused.json()["eta_seconds"] > 0.2
        assert int(refused.headers["retry-after"]) >= 1
        assert client.post("/v1/jobs", json=BRIEF | {"options": {"deadline_seconds": 3600}}).status_code == 202
        for job_id in waiting:
            client.post(f"/v1/jobs/{job_id}/cancel")


@pytest.fixture(autouse=True)
async def _empty(valkey_url: str) -> None:
    async with open_redis(valkey_url) as redis:
        await redis.flushall()
