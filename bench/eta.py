"""Are the ETAs honest? A seeded mixed load with bursts, and how many jobs end before their p50 and p90.

Starts a Valkey, one gateway and two workers of two slots with the `fake` engine (which takes a fixed time a step), and
submits jobs of several accounts, sizes and numbers of steps at a rate that swings between idle and overload. What
counts is the ETA that each job's own 202 answer shows, against the job's end; jobs that come before anything was
measured have none and are counted apart.

    python bench/eta.py [--quick] [--seed N]
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from img2img.embedded import EmbeddedValkey
from tests.stack import Gateway, Stack

STEP_SECONDS: Final = 0.01
WORKERS, SLOTS = 2, 2
SIZES: Final = ((256, 256), (256, 384), (512, 512))
STEPS: Final = (2, 5, 10, 20)
ACCOUNTS: Final = ("large", "large", "large", "middle", "small")
MEAN_SECONDS: Final = STEP_SECONDS * statistics.mean(STEPS)
CAPACITY: Final = WORKERS * SLOTS / MEAN_SECONDS
"""Jobs a second."""
PHASES: Final = (0.3, 1.3, 0.6, 0.9, 0.1)
"""Load, as a share of the capacity, for equal parts of the run."""


@asynccontextmanager
async def service() -> AsyncIterator[Gateway]:
    with tempfile.TemporaryDirectory() as folder:
        async with EmbeddedValkey(Path(folder) / "data") as valkey:
            with Stack(valkey.url, Path(folder), log_level="warning") as stack:
                tenants = Path(folder) / "tenants.toml"
                tenants.write_text("".join(_entry(account) for account in sorted(set(ACCOUNTS))))
                for _ in range(WORKERS):
                    stack.worker(concurrency=str(SLOTS), fake_step_seconds=str(STEP_SECONDS), log_level="info")
                yield stack.gateway(log_level="info", tenants_file=str(tenants))


def _entry(account: str) -> str:
    """An account whose key is its name."""
    return f'[[tenants]]\naccount = "{account}"\nkey_sha256 = ["{hashlib.sha256(account.encode()).hexdigest()}"]\n'


def _headers(account: str) -> dict[str, str]:
    return {"authorization": f"Bearer {account}"}


class Load:
    """Submits jobs at random times and notes what each was told."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._random = random.Random(seed)
        self.answers: list[tuple[str, dict[str, Any]]] = []

    async def run(self, jobs: int) -> None:
        phase_jobs = [round(jobs * phase / sum(PHASES)) for phase in PHASES]
        async with asyncio.TaskGroup() as group:
            for count, phase in zip(phase_jobs, PHASES, strict=True):
                for number in range(count):
                    await asyncio.sleep(self._random.expovariate(phase * CAPACITY))
                    group.create_task(self._submit(self._random.choice(ACCOUNTS), self._body(number)))

    def _body(self, number: int) -> dict[str, Any]:
        width, height = self._random.choice(SIZES)
        return {
            "prompt": f"a lion, {number}",
            "num_steps": self._random.choice(STEPS),
            "width": width,
            "height": height,
            "options": {"priority": self._random.choice((0, 0, 0, 1))},
        }

    async def _submit(self, account: str, body: dict[str, Any]) -> None:
        answer = await self._client.post("/v1/jobs", json=body, headers=_headers(account))
        answer.raise_for_status()
        self.answers.append((account, answer.json()))


async def measure(jobs: int, seed: int) -> dict[str, float]:
    async with service() as gateway, httpx.AsyncClient(base_url=gateway.http, timeout=60, trust_env=False) as client:
        load = Load(client, seed)
        started = time.perf_counter()
        await load.run(jobs)
        ends = {}
        for account, answer in load.answers:
            job = (await client.get(answer["links"]["self"], params={"wait": 60}, headers=_headers(account))).json()
            assert job["state"] == "succeeded", job
            ends[job["id"]] = _seconds(job["finished_at"])
        took = time.perf_counter() - started
    told = [answer for _, answer in load.answers if answer["eta"]]
    waits = sorted(ends[answer["id"]] - _seconds(answer["created_at"]) for answer in told)
    return {
        "jobs": len(load.answers),
        "with_eta": len(told),
        "before_p50": _share(told, ends, "p50"),
        "before_p90": _share(told, ends, "p90"),
        "p90_over_actual": round(
            statistics.median(
                (_seconds(answer["eta"]["p90"]) - _seconds(answer["created_at"]))
                / (ends[answer["id"]] - _seconds(answer["created_at"]))
                for answer in told
            ),
            2,
        ),
        "wait_p50_s": round(statistics.median(waits), 3),
        "wait_max_s": round(waits[-1], 3),
        "seconds": round(took, 1),
    }


def _share(told: list[dict[str, Any]], ends: dict[str, float], name: str) -> float:
    met = sum(ends[answer["id"]] <= _seconds(answer["eta"][name]) for answer in told)
    return round(met / len(told), 3)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer jobs")
    parser.add_argument("--seed", type=int, default=7, help="of the load (7)")
    arguments = parser.parse_args()
    figures = uvloop.run(measure(400 if arguments.quick else 2000, arguments.seed))
    print(
        f"{figures['with_eta']} of {figures['jobs']} jobs had an ETA: {100 * figures['before_p50']:.1f} % ended before "
        f"their p50, {100 * figures['before_p90']:.1f} % before their p90"
    )
    print(json.dumps({"bench": "eta", "seed": arguments.seed, **figures}))


if __name__ == "__main__":
    main()
