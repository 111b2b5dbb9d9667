"""What a queue and its blobs do when the connection to the server, or the server itself, fails in some way."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError

from img2img.blobs import RedisBlobs
from img2img.errors import Unavailable
from img2img.events import EventHub
from img2img.jobs import JobState
from img2img.queue import JobQueue
from img2img.server import CALL_SECONDS, MAX_CONNECTIONS, TimedRedis, open_redis
from tests.proxy import Proxy
from tests.queue.calls import LEASE, SUCCEEDED, claim_one, submit
from tests.valkey import ValkeyServer

HOUR = 3_600_000
COUNT = 500
ENDLESS_SCRIPT = "while true do end"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def proxy(server: ValkeyServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
async def admin(server: ValkeyServer) -> AsyncIterator[TimedRedis]:
    """The server itself, past the proxy; empty at the start."""
    async with open_redis(server.url) as redis:
        await redis.flushall()
        yield redis


@pytest.fixture
async def redis(proxy: Proxy, admin: TimedRedis) -> AsyncIterator[TimedRedis]:
    async with open_redis(proxy.url) as redis:
        yield redis


@pytest.fixture
def queue(redis: TimedRedis) -> JobQueue:
    return JobQueue(redis)


@pytest.fixture
def blobs(redis: TimedRedis, queue: JobQueue) -> RedisBlobs:
    return RedisBlobs(redis, queue.prefix)


async def run_one(queue: JobQueue) -> str:
    """Claim and finish the next job."""
    claim = await claim_one(queue)
    await queue.finish(claim, SUCCEEDED)
    return claim.id


async def until_available(queue: JobQueue) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await queue.stats()
            except Unavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_silence_is_unavailable_in_time(
    queue: JobQueue, redis: TimedRedis, blobs: RedisBlobs, proxy: Proxy
) -> None:
    """Every kind of call ends within its one limit, over old connections and new; then everything goes on."""
    job_id = await submit(queue)
    await redis.ping()
    with proxy.black_hole():
        async with asyncio.timeout(3 * CALL_SECONDS):
            errors = await asyncio.gather(
                queue.get(job_id),
                queue.stats(),
                queue.cancel(job_id),
                submit(queue),
                claim_one(queue),
                blobs.put("k", b"data", HOUR),
                blobs.delete("k"),
                queue.wait_for_work(1.0),
                return_exceptions=True,
            )
        assert [type(error) for error in errors] == [Unavailable] * len(errors)
    assert await run_one(queue) is not None
    assert redis.connection_pool.can_get_connection()


async def test_a_blocking_call_outlasts_the_limit_of_others(queue: JobQueue) -> None:
    """An idle worker's wait is no failure, however long it is."""
    started = time.monotonic()
    await queue.wait_for_work(CALL_SECONDS + 0.5)
    assert time.monotonic() - started > CALL_SECONDS


async def test_a_watcher_hears_again_after_a_silence(queue: JobQueue, admin: TimedRedis, proxy: Proxy) -> None:
    """The hub's own connection is cut, its new one swallowed; what happened meanwhile is told, once, in order."""
    beside = JobQueue(admin)
    job_id = await submit(beside)
    async with EventHub(queue) as hub, hub.follow(job_id) as follower:
        seen = [event.seq for event in await follower.next(10)]
        with proxy.black_hole():
            proxy.cut()
            await run_one(beside)
        async with asyncio.timeout(30):
            while len(seen) < 3:
                try:
                    seen += [event.seq for event in await follower.next(10)]
                except Unavailable:
                    continue
    assert seen == [1, 2, 3]


async def test_killed_connections_cost_nothing(queue: JobQueue, admin: TimedRedis) -> None:
    """All clients are killed again and again while jobs are made and run: none is lost, none doubled, no error.

    Not again before each side has got on, or a call on a slow machine would be hit more often than it is repeated.
    """
    made: list[str] = []
    ran: list[str] = []

    async def make() -> None:
        while len(made) < COUNT:
            made.append(await submit(queue))

    async def work() -> None:
        while len(ran) < COUNT:
            claims, _ = await queue.claim("w1", 5, LEASE, token=queue.new_id(), engine="fake/fake")
            for claim in claims:
                await queue.finish(claim, SUCCEEDED)
                ran.append(claim.id)
            if not claims:
                await queue.wait_for_work(0.1)

    async with asyncio.TaskGroup() as group:
        group.create_task(make())
        group.create_task(work())
        while len(ran) < COUNT:
            await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            wanted = [min(len(side) + 10, COUNT) for side in (made, ran)]
            while len(made) < wanted[0] or len(ran) < wanted[1]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert sorted(ran) == sorted(made)


async def test_forgotten_scripts_are_loaded_again(queue: JobQueue, redis: TimedRedis, admin: TimedRedis) -> None:
    """SCRIPT FLUSH, as a restart does it: in the middle of a job's life, and for a script in a pipeline."""
    job_id = await submit(queue)
    await admin.script_flush()
    assert await run_one(queue) == job_id
    script = redis.register_script("return ARGV[1]")
    await admin.script_flush()
    async with redis.pipeline(transaction=False) as pipe:
        await script(args=["x"], client=pipe)
        assert await pipe.execute() == [b"x"]


async def test_a_busy_server_is_unavailable(queue: JobQueue, admin: TimedRedis, server: ValkeyServer) -> None:
    """A script that does not end makes the server refuse everybody; once it is killed, all is well."""
    await admin.config_set("busy-reply-threshold", 50)
    job_id = await submit(queue)
    async with open_redis(server.url) as other:
        endless = asyncio.create_task(other.eval(ENDLESS_SCRIPT, 0))
        assert "BUSY" in str(await refusal(queue))
        await admin.script_kill()
        with pytest.raises(ResponseError, match="killed"):
            await endless
    assert await run_one(queue) == job_id


async def refusal(queue: JobQueue) -> BaseException | None:
    """Ask until the server refuses; its own error."""
    async with asyncio.timeout(30):
        while True:
            try:
                await queue.stats()
            except Unavailable as exc:
                return exc.__cause__
            await asyncio.sleep(0.01)


async def test_a_full_server_takes_no_job_and_loses_none(queue: JobQueue, admin: TimedRedis, blobs: RedisBlobs) -> None:
    """Out of memory: nothing is accepted, nothing half-written, and all goes on when there is memory again."""
    job_id = await submit(queue)
    before = sorted(await admin.keys())
    await admin.config_set("maxmemory", 1)
    try:
        for call in (submit(queue), blobs.put("k", b"data", HOUR)):
            with pytest.raises(Unavailable, match="OutOfMemory"):
                await call
        assert sorted(await admin.keys()) == before
        assert (await queue.get(job_id)).state == JobState.QUEUED
    finally:
        await admin.config_set("maxmemory", 0)
    assert [await run_one(queue), await submit(queue) is not None] == [job_id, True]


async def test_a_server_without_a_connection_to_spare_is_unavailable(queue: JobQueue, admin: TimedRedis) -> None:
    """maxclients is reached: new connections are refused, and possible again when others have gone."""
    await admin.config_set("maxclients", 1)
    try:
        with pytest.raises(Unavailable):
            await submit(queue)
    finally:
        await admin.config_set("maxclients", 1000)
    assert await submit(queue) == await run_one(queue)


async def test_an_exhausted_pool_is_unavailable(queue: JobQueue, redis: TimedRedis) -> None:
    """Every connection is taken by a blocking call: others wait for one within their limit, and get it afterwards."""
    async with asyncio.TaskGroup() as group:
        for _ in range(MAX_CONNECTIONS):
            group.create_task(queue.wait_for_work(CALL_SECONDS + 1))
        await asyncio.sleep(0)  # each has taken its connection
        assert not redis.connection_pool.can_get_connection()
        with pytest.raises(Unavailable):
            await queue.stats()
    assert await submit(queue) == await run_one(queue)


@pytest.mark.parametrize("in_pipeline", [False, True])
async def test_a_demoted_server_is_left(
    queue: JobQueue, redis: TimedRedis, admin: TimedRedis, proxy: Proxy, tmp_path: Path, in_pipeline: bool
) -> None:
    """READONLY: the address leads to another server by now, so the call succeeds there, and no connection stays."""
    await asyncio.gather(submit(queue), submit(queue), submit(queue))
    await admin.replicaof("127.0.0.1", 1)
    try:
        with ValkeyServer(tmp_path) as promoted:
            proxy.target = promoted.port
            if in_pipeline:
                async with redis.pipeline(transaction=False) as pipe:
                    pipe.rpush(queue.wake_key, "1")
                    await pipe.execute()
            else:
                await submit(queue)
            assert len(await admin.client_list(_type="normal")) == 1
            assert await redis.exists(queue.wake_key)
    finally:
        await admin.replicaof("NO", "ONE")


async def test_a_server_that_stays_read_only_is_unavailable(queue: JobQueue, admin: TimedRedis) -> None:
    """As long as the address leads to a replica; no sooner is it promoted than jobs are taken."""
    await admin.replicaof("127.0.0.1", 1)
    try:
        with pytest.raises(Unavailable, match="ReadOnly"):
            await submit(queue)
    finally:
        await admin.replicaof("NO", "ONE")
    assert await submit(queue) == await run_one(queue)


async def test_a_server_that_loads_is_unavailable(tmp_path: Path) -> None:
    """While it reads its file after a kill, it answers nothing but LOADING; then everything is there."""
    slowly = ("key-load-delay 1000", "loading-process-events-interval-bytes 1024")
    with ValkeyServer(tmp_path, *slowly) as server:
        async with open_redis(server.url) as redis:
            queue = JobQueue(redis)
            job_id = await submit(queue)
            async with redis.pipeline(transaction=False) as pipe:
                for number in range(3000):
                    pipe.set(f"ballast:{number}", "x" * 100)
                pipe.save()
                await pipe.execute()
            server.kill()
            server.start()
            while not isinstance(reason := await refusal(queue), BusyLoadingError):
                assert isinstance(reason, ConnectionError)
            await until_available(queue)
            assert await run_one(queue) == job_id


async def test_a_large_picture_may_take_its_time(blobs: RedisBlobs, proxy: Proxy) -> None:
    """16 MiB over a line on which they take longer than any other call may, both ways."""
    picture, until = bytes(16 * 1024 * 1024), int(time.time() * 1000) + HOUR
    await blobs.put("there", picture, until)
    proxy.bytes_per_second = len(picture) / (CALL_SECONDS + 1)
    _, got = await asyncio.gather(blobs.put("k", picture, until), blobs.get("there"))
    proxy.bytes_per_second = None
    assert got == await blobs.get("k") == picture


async def test_connections_are_kept_alive(redis: TimedRedis) -> None:
    """The kernel asks after a silent peer, long before its own default of two hours."""
    connection = await redis.connection_pool.get_connection()
    try:
        transport = connection._writer.get_extra_info("socket")
        assert transport.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert transport.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
    finally:
        await redis.connection_pool.release(connection)
