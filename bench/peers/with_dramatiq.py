"""dramatiq with 20 threads; with ``BENCH_RESULTS`` it stores results, which is not its default."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from protocol import PAYLOAD, THREADS, URL, job, notes, produce_blocking

RESULTS = bool(os.environ.get("BENCH_RESULTS"))
broker = RedisBroker(url=URL)
if RESULTS:
    broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(actor_name="run", **({"store_results": True} if RESULTS else {}))
def run(payload: str) -> str | None:
    result = job(payload)
    return result if RESULTS else None


submissions = itertools.count(1)


def submit() -> Any:
    submitted, number = run.send(PAYLOAD), next(submissions)
    if not RESULTS:
        return lambda: notes().wait_for(number)
    return lambda: submitted.get_result(block=True, timeout=60_000)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        os.chdir(Path(__file__).parent)
        command = ["dramatiq", "with_dramatiq", "-p", "1", "-t", str(THREADS)]
        os.execv(Path(sys.executable).with_name("dramatiq"), command)
    else:
        produce_blocking(submit)
