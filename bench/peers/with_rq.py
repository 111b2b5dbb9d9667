"""rq with its simple worker, which does not fork for each job."""

import logging
import sys
from typing import Any

from protocol import PAYLOAD, URL, job, produce_blocking
from redis import Redis
from rq import Queue, SimpleWorker

redis = Redis.from_url(URL)
queue = Queue(connection=redis)


def submit() -> Any:
    submitted = queue.enqueue(job, PAYLOAD)
    return lambda: submitted.latest_result(timeout=60)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        logging.disable(logging.CRITICAL)
        SimpleWorker([queue], connection=redis).work(logging_level="CRITICAL")
    else:
        produce_blocking(submit)
