"""An autoscaler like KEDA's takes a fleet from none to many and back, on what the gateway says: real processes."""

import signal
import time

import pytest

from tests.keda import Keda
from tests.stack import Process, Stack, ended, eventually, submit

pytestmark = pytest.mark.usefixtures("empty_server")
TARGET = 2.0
JOBS, STEPS, STEP_SECONDS = 12, 10, 0.05
"""What a step takes is what the queue guesses while nothing was measured."""


def test_from_none_to_many_and_back(stack: Stack) -> None:
    """The first worker is called for at once, then as many as the work needs; none that is busy is taken away, and in
    the end none is left.
    """
    gateway = stack.gateway(scaler_port="0")
    assert gateway.scaler is not None
    with gateway.client() as client, Keda(gateway.scaler, pool="default", targetSeconds=f"{TARGET}") as keda:
        pushed = keda.pushed()
        assert next(pushed) is False
        assert (keda.is_active(), keda.replicas()) == (False, 0)
        jobs = [submit(client, prompt="a lion", seed=seed, num_steps=STEPS) for seed in range(JOBS)]
        assert next(pushed) is True
        owed = JOBS * STEPS * STEP_SECONDS
        eventually(lambda: keda.metric() == owed, f"{owed} s are owed")
        fleet = stack.workers(keda.replicas(), concurrency="1", fake_step_seconds=f"{STEP_SECONDS}")
        assert len(fleet) == 3
        while fleet:
            shrink(fleet, min(len(fleet), keda.replicas()))
            time.sleep(0.05)
        assert next(pushed) is False
        ended = [client.get(f"/v1/jobs/{job['id']}").json() for job in jobs]
    assert {(job["state"], job["attempt"]) for job in ended} == {("succeeded", 1)}


def shrink(fleet: list[Process], count: int) -> None:
    """End the youngest, as Kubernetes does; whatever one runs it finishes."""
    leaving = [fleet.pop() for _ in range(len(fleet) - count)]
    for worker in leaving:
        worker.signal(signal.SIGTERM)
    for worker in leaving:
        assert worker.wait() == 0


def test_what_was_measured_counts_when_no_worker_is_left(stack: Stack) -> None:
    """Times that a worker took outlive it: the next fleet is as large as the work then turned out to be."""
    gateway = stack.gateway(scaler_port="0")
    assert gateway.scaler is not None
    with gateway.client() as client, Keda(gateway.scaler, pool="default", targetSeconds="1") as keda:
        worker = stack.worker(concurrency="4", fake_step_seconds="0.2")
        jobs = [submit(client, prompt="a lion", seed=seed, num_steps=5)["id"] for seed in range(4)]
        assert [ended(client, job_id)["state"] for job_id in jobs] == ["succeeded"] * 4
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        eventually(lambda: keda.replicas() == 0, "nothing is owed")
        for seed in range(3):
            submit(client, prompt="a lion", seed=seed, num_steps=5)
        # Three seconds, where the guess would be three quarters of one.
        eventually(lambda: keda.metric() >= 3, "as much is owed as it takes")
