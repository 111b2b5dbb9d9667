"""An account's jobs, page by page."""

from typing import Any

import pytest
from arq.connections import ArqRedis

from img2img.errors import JobNotFound
from img2img.jobs import JobState
from img2img.queue import JobQueue
from img2img.queue_types import Lifetime
from img2img.server import open_redis
from tests.queue.calls import KEEP, spec, submit


async def test_pages_of_an_account(queue: JobQueue) -> None:
    """Newest first, without gaps or doubles over pages; other accounts' jobs are not there."""
    mine = [await submit(queue) for _ in range(5)]
    await queue.submit(spec(queue, account="other"), Lifetime(60, KEEP))
    await queue.cancel(mine[1])
    seen: list[str] = []
    cursor = None
    while True:
        page = await queue.list_jobs("acme", cursor=cursor, limit=2)
        seen += [job.id for job in page.jobs]
        if (cursor := page.next) is None:
            break
    assert seen == mine[::-1]
    only = await queue.list_jobs("acme", state=JobState.CANCELED, limit=2)
    assert [job.id for job in only.jobs] == [mine[1]]
    with pytest.raises(JobNotFound):
        await queue.get(mine[0], account="other")


@pytest.mark.parametrize("state", [None, JobState.QUEUED])
async def test_jobs_that_come_meanwhile_double_none(
    queue: JobQueue, redis: ArqRedis, valkey_url: str, monkeypatch: pytest.MonkeyPatch, state: JobState | None
) -> None:
    """Each moves all that there are by a place, here between any two commands, and is on no page after the first."""
    monkeypatch.setattr("img2img.queue.LIST_STEP", 2)
    mine = [await submit(queue) for _ in range(6)]
    asked, came = redis.execute_command, 0

    async def one_more_comes(*arguments: Any, **options: Any) -> Any:
        nonlocal came
        answer = await asked(*arguments, **options)
        await submit(beside)
        came += 1
        return answer

    async with open_redis(valkey_url) as others:
        beside = JobQueue(others)
        first = await queue.list_jobs("acme", state=state, limit=2)
        monkeypatch.setattr(redis, "execute_command", one_more_comes)
        second = await queue.list_jobs("acme", state=state, cursor=first.next, limit=4)
    assert came > 0
    assert [job.id for page in (first, second) for job in page.jobs] == mine[::-1]
