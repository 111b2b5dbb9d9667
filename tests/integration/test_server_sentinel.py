"""A master dies, sentinels promote its replica: gateways and workers follow, and jobs go on."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
import redis

from img2img.errors import Unavailable
from img2img.events import EventHub
from img2img.jobs import JobEvent
from img2img.queue import JobQueue
from img2img.server import check_server, open_redis
from tests.calls import problem
from tests.queue.calls import submit as submit_job
from tests.stack import Stack, eventually, state_of, submit
from tests.valkey import ValkeyServer, free_port

MASTER = "main"
PASSWORD, SENTINEL_PASSWORD = "server/secret", "sentinel secret"
CONFIG = (f'masterauth "{PASSWORD}"', "appendonly yes", "appendfsync always", "repl-diskless-sync-delay 0")
CLIENT = "img2img-test"
T = TypeVar("T")


class Cluster:
    """A master, its replica and a sentinel, each with its password."""

    def __init__(self, folder: Path) -> None:
        self.master = ValkeyServer(folder / "master", *CONFIG, password=PASSWORD)
        self.replica = ValkeyServer(
            folder / "replica", *CONFIG, f"replicaof 127.0.0.1 {self.master.port}", password=PASSWORD
        )
        self.sentinel = ValkeyServer(
            folder / "sentinel",
            f"sentinel monitor {MASTER} 127.0.0.1 {self.master.port} 1",
            f'sentinel auth-pass {MASTER} "{PASSWORD}"',
            f"sentinel down-after-milliseconds {MASTER} 500",
            f"sentinel failover-timeout {MASTER} 3000",
            password=SENTINEL_PASSWORD,
            sentinel=True,
        )

    @property
    def url(self) -> str:
        """The first of the sentinels is never there."""
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}"
        return f"redis+sentinel://:server%2Fsecret@{hosts}/{MASTER}/0?client_name={CLIENT}&sentinel_password=sentinel%20secret"

    def wait_replicated(self) -> None:
        """The replica has all that the master has."""
        with self.master.client() as master:
            eventually(lambda: master.wait(1, 100) == 1, "the replica follows")

    def wait_known(self) -> None:
        """The sentinel has asked the replica, and would promote it."""
        with self.sentinel.client() as sentinel:
            eventually(lambda: linked(sentinel), "the sentinel knows the replica")

    def fail_over(self) -> None:
        """Make the replica the master, and the master its replica, which nobody uses any more."""
        with self.sentinel.client() as sentinel:
            sentinel.sentinel_failover(MASTER)
        self.wait_promoted()
        with self.master.client() as old, self.replica.client() as new:
            eventually(lambda: is_replica(old), "the old master is a replica")
            eventually(lambda: not ours(old) and ours(new), "all use the new master")

    def wait_promoted(self) -> None:
        with self.sentinel.client() as sentinel:
            port = self.replica.port
            eventually(lambda: sentinel.sentinel_get_master_addr_by_name(MASTER)[1] == port, "a new master")


def is_replica(server: redis.Redis) -> bool:
    """Whether it is one by now. The sentinel that makes it one cuts all of its connections, the one that asks, too."""
    try:
        return bool(server.role()[0] == b"slave")
    except redis.ConnectionError:
        return False


def ours(server: redis.Redis) -> bool:
    """Whether a connection of the code under test is there."""
    return any(client["name"] == CLIENT for client in server.client_list())


def linked(sentinel: redis.Redis) -> bool:
    return [replica["master-link-status"] for replica in sentinel.sentinel_slaves(MASTER)] == ["ok"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    with cluster.master, cluster.replica:
        cluster.wait_replicated()
        with cluster.sentinel:
            cluster.wait_known()
            yield cluster


def test_jobs_outlive_their_master(cluster: Cluster, tmp_path: Path) -> None:
    """kill -9: what was accepted and replicated goes on, what comes is 503 until the new master takes it."""
    with Stack(cluster.url, tmp_path, lease="2", beat="0.5") as stack:
        stack.worker()
        with stack.gateway().client() as client:
            running = submit(client, prompt="a dog fake:step=0.2", num_steps=20)["id"]
            eventually(lambda: state_of(client, running) == "running", "running")
            queued = [submit(client, prompt="a dog")["id"] for _ in range(5)]
            cluster.wait_replicated()
            cluster.master.kill()
            problem(eventually(lambda: refusal(client), "without a master"), 503, "unavailable")
            eventually(lambda: client.post("/v1/jobs", json={"prompt": "a dog"}).status_code == 202, "jobs are taken")
            cluster.wait_promoted()
            for job_id in (running, *queued):
                job = client.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()
                assert job["state"] == "succeeded"
                assert client.get(f"/v1/jobs/{job_id}/image").status_code == 200


def refusal(client: httpx.Client) -> httpx.Response | None:
    """The answer to a request, if it is none of success."""
    answer = client.get("/v1/queue")
    return None if answer.is_success else answer


async def test_everybody_follows_a_master_that_only_moves(cluster: Cluster) -> None:
    """An orderly failover: calls, a blocked wait and the hub go on at the new master, and nobody stays at the old."""
    async with open_redis(cluster.url) as connection:
        await check_server(connection, patience=0)
        queue = JobQueue(connection)
        async with EventHub(queue) as hub:
            job_id = await submit_job(queue)
            async with hub.follow(job_id) as follower:
                assert [event.type for event in await follower.next(10)] == ["queued"]
                await queue.wait_for_work(10)
                woken = asyncio.create_task(patiently(lambda: queue.wait_for_work(60)))
                await asyncio.to_thread(cluster.fail_over)
                await patiently(lambda: queue.cancel(job_id))
                events: list[JobEvent] = []
                while not events:
                    events = await patiently(lambda: follower.next(10))
                assert [event.type for event in events] == ["canceled"]
                await submit_job(queue)
                async with asyncio.timeout(20):
                    await woken


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Call again until the server can be reached."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.05)
