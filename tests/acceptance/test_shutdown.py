"""Workers that are told to stop cost no job an attempt, and do not wait for a server that is gone."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from redis import Redis

from tests.stack import Process, Stack, ended, eventually, state_of, submit

ROWS, STOPS, JOBS = 2, 10, 80
FAST_LEASE = {"lease": "1.5", "beat": "0.4"}
SLOW = {"drain_timeout": "0.1", "concurrency": "3", "fake_step_seconds": "1"}


def roll(workers: Stack) -> list[Process]:
    """Replace a worker again and again, each time as soon as its successor is ready; the ones that were stopped.

    Whatever these workers do, it takes minutes: each is stopped in the middle of it.
    """
    stopped = []
    worker = workers.worker(**SLOW)
    for _ in range(STOPS):
        successor = workers.worker(**SLOW)
        worker.signal(signal.SIGTERM)
        stopped.append(worker)
        worker = successor
    return stopped


def count(workers: list[Process], event: str) -> int:
    return sum(entry.get("event") == event for worker in workers for entry in worker.entries())


def test_rolling_restarts_cost_no_attempt(stack: Stack, valkey_url: str, tmp_path: Path) -> None:
    """Twenty workers are stopped in mid-job, one after another: each job ends well, with the only attempt it has."""
    with ExitStack() as opened, stack.gateway(attempts="1", crash_limit="1").client() as client:
        jobs = [submit(client, prompt=f"dog {number}")["id"] for number in range(JOBS)]
        rows = []
        for row in range(ROWS):
            folder = tmp_path / f"row {row}"
            folder.mkdir()
            rows.append(opened.enter_context(Stack(valkey_url, folder)))
        with ThreadPoolExecutor(ROWS) as pool:
            stopped = [worker for row in pool.map(roll, rows) for worker in row]
        assert [worker.wait() for worker in stopped] == [0] * ROWS * STOPS
        assert count(stopped, "job_released") >= len(stopped)
        opened.close()
        stack.worker(concurrency="3")
        ends = [ended(client, job_id) for job_id in jobs]
    assert [job["state"] for job in ends] == ["succeeded"] * JOBS


def test_a_worker_does_not_wait_for_a_server_that_is_silent(stack: Stack, valkey_url: str) -> None:
    """What it cannot hand back it gives up; the lease runs out when the server is back, and the job runs elsewhere."""
    leaving = stack.worker(drain_timeout="0.2", fake_step_seconds="1", **FAST_LEASE)
    with stack.gateway().client() as client, Redis.from_url(valkey_url) as redis:
        server = redis.info("server")["process_id"]
        job_id = submit(client, prompt="a dog")["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
        os.kill(server, signal.SIGSTOP)
        try:
            leaving.signal(signal.SIGTERM)
            assert leaving.wait() == 0
        finally:
            os.kill(server, signal.SIGCONT)
        assert any(entry.get("event") == "finish_given_up" for entry in leaving.entries())
        stack.worker(**FAST_LEASE)
        job = ended(client, job_id)
    assert (job["state"], job["attempt"]) == ("succeeded", 2)
