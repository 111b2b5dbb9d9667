"""celery with 20 threads and its Redis result backend."""

import os
import sys
from pathlib import Path
from typing import Any

from celery import Celery
from protocol import PAYLOAD, THREADS, URL, job, produce_blocking

app = Celery("with_celery", broker=URL, backend=URL)
app.conf.broker_connection_retry_on_startup = True
COMMAND = f"celery -A with_celery worker -P threads -c {THREADS} -l ERROR --without-gossip --without-mingle"


@app.task(name="run")
def run(payload: str) -> str:
    return job(payload)


def submit() -> Any:
    submitted = run.delay(PAYLOAD)
    return lambda: submitted.get(timeout=60)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        os.chdir(Path(__file__).parent)
        os.execv(Path(sys.executable).with_name("celery"), COMMAND.split())
    else:
        produce_blocking(submit)
