"""Ours: the real ``JobQueue``, ``EventHub`` and ``Consumer``, whose runner does nothing but answer."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop
from protocol import SLOTS, URL, Submit, job, produce

sys.path.append(str(Path(__file__).parents[2]))

from bench.jobs import LIFETIME, fresh_spec
from img2img import telemetry
from img2img.events import EventHub
from img2img.jobs import JobState, Outcome, Result
from img2img.queue_types import Claim, WorkerInfo
from img2img.settings import Settings
from img2img.wiring import open_parts
from worker.attempt import StageClock, Stop
from worker.consumer import Consumer
from worker.engines.fake import FakeEngine
from worker.runner import Decision

SETTINGS: Final = Settings(redis_url=URL, concurrency=SLOTS)
RESULT: Final = Result(
    blob="result:0", media_type="image/png", width=512, height=512, bytes=1, sha256="0" * 64, expires_at=0
)


class NoopRunner:
    """Ends every job at once."""

    async def run(self, claim: Claim, stop: Stop, clock: StageClock) -> Decision:
        job(claim.id)
        return Outcome(state=JobState.SUCCEEDED, result=RESULT, executed_by="none")

    def note(self, claim: Claim, decision: Decision) -> None:
        return


@asynccontextmanager
async def client() -> AsyncIterator[Submit]:
    async with open_parts(SETTINGS) as parts, EventHub(parts.queue) as hub:

        async def result(job_id: str) -> Outcome:
            async with hub.follow(job_id) as follower:
                while True:
                    for event in await follower.next(60):
                        if event.is_terminal:
                            return msgspec.convert(event.data, Outcome)

        async def submit() -> Any:
            submitted = await parts.queue.submit(fresh_spec(), LIFETIME)
            return lambda: result(submitted.id)

        yield submit


async def work() -> None:
    async with open_parts(SETTINGS) as parts:
        info = WorkerInfo("bench", SLOTS, "none", "none", "cpu")
        consumer = Consumer(parts.queue, NoopRunner(), FakeEngine(), info, SETTINGS)  # type: ignore[arg-type]
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.drain)
        await consumer.main()


if __name__ == "__main__":
    telemetry.configure_logging("warning", "json")
    if sys.argv[1] == "worker":
        uvloop.run(work())
    else:
        produce(client)
