"""The event hub: one connection that many tasks follow jobs through, whatever happens to it."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from arq.connections import ArqRedis

from img2img.errors import Unavailable
from img2img.events import READ_LIMIT, EventHub, Follower
from img2img.queue import JobQueue
from img2img.server import open_redis

PROMPTLY = 5.0
"""Seconds; well below the time after which a follower looks up by itself."""
NUMBERS = itertools.count()


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[ArqRedis]:
    async with open_redis(valkey_url) as connection:
        yield connection


@pytest.fixture
def queue(redis: ArqRedis) -> JobQueue:
    return JobQueue(redis)


def new_job() -> str:
    return f"0-job{next(NUMBERS)}"


async def emit(queue: JobQueue, job_id: str, first: int = 1, count: int = 1, ring: bool = True) -> None:
    """Events as the queue's scripts write them."""
    async with queue.redis.pipeline(transaction=True) as pipe:
        for _ in range(first, first + count):
            pipe.rpush(queue.events_key(job_id), '{"type":"progress","at":1,"data":{}}')
        if ring:
            pipe.publish(queue.bell(job_id), "")
        await pipe.execute()


async def heard(follower: Follower) -> list[int]:
    """The numbers that the next ring brings, if it comes soon."""
    async with asyncio.timeout(PROMPTLY):
        while not (events := await follower.next(60)):
            pass
    return [event.seq for event in events]


async def channels(queue: JobQueue) -> set[bytes]:
    return set(await queue.redis.pubsub_channels("*"))


async def until_channels(queue: JobQueue, *job_ids: str) -> None:
    wanted = {queue.bell(job_id).encode() for job_id in job_ids}
    async with asyncio.timeout(PROMPTLY):
        while await channels(queue) != wanted:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)


async def kill_subscriptions(queue: JobQueue) -> None:
    await queue.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


@pytest.mark.parametrize("warm", [False, True])
async def test_first_followers_at_once(queue: JobQueue, warm: bool) -> None:
    """Tasks that follow at the same moment, before the hub has ever subscribed, all hear their bells."""
    if warm:
        await asyncio.gather(*(queue.redis.ping() for _ in range(8)))
    jobs = [new_job() for _ in range(8)]

    async def follow(job_id: str) -> list[int]:
        async with hub.follow(job_id) as follower:
            await emit(queue, job_id)
            return await heard(follower)

    async with EventHub(queue) as hub:
        assert await asyncio.gather(*map(follow, jobs)) == [[1]] * len(jobs)
        await until_channels(queue)


async def test_a_second_follower_reads_what_was_missed(queue: JobQueue) -> None:
    """One that joins a bell that is in place is rung at once, and both hear it afterwards."""
    job_id = new_job()
    async with EventHub(queue) as hub, hub.follow(job_id) as first:
        await emit(queue, job_id)
        assert await heard(first) == [1]
        async with hub.follow(job_id) as second:
            assert await heard(second) == [1]
            await emit(queue, job_id, 2)
            assert (await heard(first), await heard(second)) == ([2], [2])


async def test_followers_survive_cut_connections(queue: JobQueue) -> None:
    """While the connection is cut again and again, tasks that come and go all hear everything, and leave nothing."""
    done = asyncio.Event()

    async def come_and_go() -> int:
        rounds = 0
        while not done.is_set():
            job_id = new_job()
            async with hub.follow(job_id) as follower:
                for number in range(1, 4):
                    await emit(queue, job_id, number)
                    assert await heard(follower) == [number]
            rounds += 1
        return rounds

    async with EventHub(queue) as hub:
        tasks = [asyncio.create_task(come_and_go()) for _ in range(8)]
        for _ in range(6):
            await asyncio.sleep(0.3)
            await kill_subscriptions(queue)
        done.set()
        assert min(await asyncio.gather(*tasks)) >= 1
        await until_channels(queue)


async def test_a_lost_connection_is_made_good(queue: JobQueue) -> None:
    """What happened meanwhile rings as soon as the bell is in place again."""
    job_id = new_job()
    async with EventHub(queue) as hub, hub.follow(job_id) as follower:
        await until_channels(queue, job_id)
        await follower.next(PROMPTLY)
        await kill_subscriptions(queue)
        await emit(queue, job_id)
        assert await heard(follower) == [1]


async def test_nobody_follows_any_more(queue: JobQueue) -> None:
    """Bells are taken down with their last follower, also where followers take turns quickly."""
    job_id, other = new_job(), new_job()
    async with EventHub(queue) as hub:
        async with hub.follow(other):
            for _ in range(50):
                async with hub.follow(job_id):
                    await asyncio.sleep(0)
            async with hub.follow(job_id) as follower:
                await emit(queue, job_id)
                assert await heard(follower) == [1]
            await until_channels(queue, other)
        await until_channels(queue)


async def test_a_full_page_rings_again(queue: JobQueue) -> None:
    """A long log is read to its end on one ring."""
    job_id, count = new_job(), 2 * READ_LIMIT + 1
    async with EventHub(queue) as hub, hub.follow(job_id) as follower:
        await until_channels(queue, job_id)
        await follower.next(PROMPTLY)
        await emit(queue, job_id, count=count, ring=False)
        found = [event.seq for event in await follower.read()]
        while len(found) < count:
            found += await heard(follower)
    assert found == list(range(1, count + 1))


async def test_a_failed_hub_ends_its_block(valkey_url: str, queue: JobQueue) -> None:
    """Whoever waits gets an error at once, and so does who comes then; the process does not live on deaf.

    The defect is one that no reconnect mends: the hub's next connection cannot even be made. Its followers read over
    a pool that nobody else uses, so that theirs is there already and they notice the hub's failure alone.
    """
    job_id = new_job()
    caught: list[Unavailable] = []
    hubs: list[EventHub] = []
    waiting: list[asyncio.Task[None]] = []
    has_read = asyncio.Event()

    async def wait(hub: EventHub) -> None:
        async with hub.follow(job_id) as follower:
            try:
                await follower.read()
                has_read.set()
                while True:
                    await follower.next(60)
            except Unavailable as exc:
                caught.append(exc)

    async def block() -> None:
        async with asyncio.timeout(PROMPTLY), open_redis(valkey_url) as redis, EventHub(JobQueue(redis)) as hub:
            hubs.append(hub)
            waiting.append(asyncio.create_task(wait(hub)))
            await has_read.wait()
            await until_channels(queue, job_id)
            redis.connection_pool.connection_kwargs["no_such_option"] = 1
            await kill_subscriptions(queue)
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as failure:
        await block()
    assert failure.group_contains(TypeError)
    await waiting[0]
    assert len(caught) == 1
    async with hubs[0].follow(job_id) as late:
        with pytest.raises(Unavailable):
            await late.next(60)


async def test_a_hub_ends_while_its_connection_is_lost(queue: JobQueue) -> None:
    """Leaving the block at the very moment of a loss is not mistaken for a part of it."""
    job_id, lost = new_job(), asyncio.Event()
    async with asyncio.timeout(PROMPTLY), EventHub(queue) as hub, hub.follow(job_id):
        await until_channels(queue, job_id)
        [listening] = [task for task in asyncio.all_tasks() if task.get_name() == "event-hub-bells"]
        listening.add_done_callback(lambda _: lost.set())
        await kill_subscriptions(queue)
        await lost.wait()


async def test_the_blocks_own_error_leaves_as_it_is(queue: JobQueue) -> None:
    """The hub's task group does not wrap what is not its own."""
    with pytest.raises(LookupError, match="mine"):
        async with EventHub(queue):
            raise LookupError("mine")
