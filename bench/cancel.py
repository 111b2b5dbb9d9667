"""How soon a cancel takes effect: from the call to the job's end, for queued and for running jobs.

Starts a Valkey (append-only file, synced on every write), one gateway and one worker with the `fake` engine at 10 ms a
step, and cancels jobs over REST one after another.

    python bench/cancel.py [--quick]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gateway import percentiles
from img2img.embedded import EmbeddedValkey
from tests.stack import Stack, eventually, state_of, submit

BODY: Final = {"prompt": "a lion fake:step=0.01", "num_steps": 20}
LONG: Final = {"prompt": "a lion fake:step=60", "num_steps": 20}


def cancel(client: httpx.Client, job_id: str) -> float:
    """Milliseconds until the job has ended."""
    started = time.perf_counter()
    client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
    job = client.get(f"/v1/jobs/{job_id}", params={"wait": 10}).json()
    assert job["state"] in ("canceled", "succeeded"), job
    return (time.perf_counter() - started) * 1000 if job["state"] == "canceled" else 0.0


def running(client: httpx.Client) -> str:
    job_id: str = submit(client, **BODY)["id"]
    eventually(lambda: state_of(client, job_id) != "queued", "running")
    return job_id


def queued(client: httpx.Client) -> str:
    job_id: str = submit(client, **BODY)["id"]
    return job_id


def rounds(client: httpx.Client, make: Callable[[httpx.Client], str], count: int) -> list[float]:
    took = [cancel(client, make(client)) for _ in range(count)]
    return [milliseconds for milliseconds in took if milliseconds]


async def measure(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        async with EmbeddedValkey(Path(folder) / "data") as valkey:
            with Stack(valkey.url, Path(folder), log_level="warning") as stack:
                worker = stack.worker(log_level="info")
                with stack.gateway(log_level="info").client() as client:
                    figures = percentiles("running", rounds(client, running, count))
                    submit(client, **LONG)  # keeps the worker busy, so that the others wait
                    figures |= percentiles("queued", rounds(client, queued, count))
                worker.kill()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer jobs")
    figures = uvloop.run(measure(50 if parser.parse_args().quick else 300))
    for name in ("queued", "running"):
        print(f"cancel of a {name} job: p50 {figures[f'{name}_p50_ms']} ms, p99 {figures[f'{name}_p99_ms']} ms")
    print(json.dumps({"bench": "cancel", **figures}))


if __name__ == "__main__":
    main()
