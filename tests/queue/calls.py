"""What the tests of the queue do again and again."""

import itertools
from collections.abc import Sequence
from typing import Any, Final

from img2img.events import EventHub
from img2img.jobs import JobSpec, JobState, Outcome
from img2img.queue import JobQueue
from img2img.queue_types import Claim, Lifetime
from img2img.requests import build_request

LEASE: Final = 60.0
"""Longer than any test that no lease is to end."""
KEEP: Final = 60.0
SUCCEEDED: Final = Outcome(state=JobState.SUCCEEDED)
_TOKENS: Final = itertools.count()


def spec(queue: JobQueue, account: str = "acme", options: dict[str, Any] | None = None, **fields: Any) -> JobSpec:
    """A request for a picture of a dog, with more ``fields``."""
    checked = build_request({"prompt": "a dog", **fields}, options)
    return JobSpec(
        id=queue.new_id(),
        account=account,
        parameters=checked.parameters,
        options=checked.options,
        seed=1,
        fingerprint=checked.fingerprint(),
    )


async def submit(
    queue: JobQueue,
    seconds: float = 60.0,
    options: dict[str, Any] | None = None,
    account: str = "acme",
    fields: dict[str, Any] | None = None,
    **more: Any,
) -> str:
    """Submit a job that ends after ``seconds`` at the latest; answers with its id."""
    job = spec(queue, account, options, **(fields or {}))
    return (await queue.submit(job, Lifetime(seconds, KEEP), **more)).id


async def claim_one(queue: JobQueue, lease: float = LEASE, worker: str = "w1", held: Sequence[Claim] = ()) -> Claim:
    """The next job, for an idle worker unless it has ``held`` others."""
    claims, _ = await queue.claim(worker, 1, lease, token=str(next(_TOKENS)), engine="fake/fake", held=held)
    return claims[0]


async def lose(queue: JobQueue, *claims: Claim) -> None:
    """The claims' leases run out: long ago, so that nobody takes it for the server's own absence."""
    for claim in claims:
        await queue.redis.zadd(f"{queue.prefix}leases:{queue.name}", {claim.id: 1})


async def event_types(queue: JobQueue, job_id: str) -> list[str]:
    async with EventHub(queue) as hub, hub.follow(job_id) as follower:
        return [event.type for event in await follower.read()]
