"""Every picture can be fetched, and is the one that was recorded."""

import asyncio
import hashlib
from typing import Final

import httpx

from img2img.jobs import JobState
from tests.calls import bearer
from tests.chaos.checker import Violation
from tests.chaos.fleet import Fleet
from tests.chaos.store import Snapshot, Stored

AT_ONCE: Final = 8


async def check_pictures(fleet: Fleet, snapshot: Snapshot) -> list[Violation]:
    """Fetch what each job made, through a gateway."""
    broken: list[Violation] = []
    slots = asyncio.Semaphore(AT_ONCE)
    (url, _), *_ = fleet.addresses
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client, asyncio.TaskGroup() as group:

        async def check(stored: Stored) -> None:
            async with slots:
                if what := await _break(client, stored):
                    broken.append(Violation(what, stored.id))

        for stored in snapshot.jobs.values():
            group.create_task(check(stored))
    return broken


async def _break(client: httpx.AsyncClient, stored: Stored) -> str | None:
    answer = await client.get(f"/v1/jobs/{stored.id}/image", headers=bearer(stored.fields["account"]))
    if stored.state != JobState.SUCCEEDED:
        return None if answer.status_code == 409 else f"{stored.state}, and its picture answers {answer.status_code}"
    if not answer.is_success:
        return f"its picture answers {answer.status_code}: {answer.text}"
    result = None if stored.outcome is None else stored.outcome.result
    if result is None or hashlib.sha256(answer.content).hexdigest() != result.sha256:
        return "its picture is not the one on record"
    return None
