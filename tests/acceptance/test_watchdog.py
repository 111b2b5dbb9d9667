"""A worker that hangs ends itself and its jobs run elsewhere; one that is only slow, or held up, keeps its jobs."""

import asyncio
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest

from img2img.queue_types import WorkerInfo
from img2img.settings import Settings
from tests.stack import Process, Stack, ended, eventually, state_of, submit
from worker.heart import Heart
from worker.watchdog import STALLED_STATUS

FAST_LEASE = {"lease": "1.5", "beat": "0.4"}
PATIENT_LEASE = {"lease": "2.5", "beat": "0.4"}
IMPATIENT = {**FAST_LEASE, "stall_limit": "1"}
MENDED = {**FAST_LEASE, "fake_obeys": "false"}


def tripped(worker: Process) -> dict[str, dict[str, Any]]:
    """What hung, as a worker's watchdog has said it; a loop that hangs takes its jobs along."""
    (entry,) = [entry for entry in worker.entries() if entry.get("event") == "watchdog_tripped"]
    assert entry["level"] == "error"
    return {hung["what"]: hung for hung in entry["hung"]}


@pytest.mark.parametrize(("fault", "phase"), [("fake:hang", "steps"), ("fake:block=60", "running")])
def test_a_hung_workers_job_runs_elsewhere(stack: Stack, fault: str, phase: str) -> None:
    """Model or event loop hang: the worker says which, shows its stacks and ends with a status of its own."""
    hanging = stack.worker(**IMPATIENT)
    with stack.gateway().client() as client:
        warm = submit(client, prompt="a dog")["id"]  # steps of this size are known from now on
        assert ended(client, warm)["state"] == "succeeded"
        job_id = submit(client, prompt=f"a dog {fault}")["id"]
        assert hanging.wait() == STALLED_STATUS
        hung = tripped(hanging)[job_id if phase == "steps" else "event loop"]
        assert hung["phase"] == phase
        assert hung["seconds"] > hung["limit"] >= 1.0  # more where the steps before were slow
        assert "Current thread" in hanging.log.read_text()
        stack.worker(**MENDED)
        job = ended(client, job_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 2)
        assert "worker_lost" in client.get(f"/v1/jobs/{job_id}/events").text


def test_slow_steps_are_no_hang(stack: Stack) -> None:
    """Steps that take many leases, under a stall limit that they keep: the first attempt makes the picture."""
    stack.worker(**FAST_LEASE)
    with stack.gateway().client() as client:
        job_id = submit(client, prompt="a dog fake:step=3", num_steps=2)["id"]
        job = ended(client, job_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 1)


def test_a_blocked_loop_keeps_its_lease(stack: Stack) -> None:
    """The event loop stands still for several leases while another worker waits for work: nobody takes the job."""
    stack.worker(**FAST_LEASE)
    with stack.gateway().client() as client:
        job_id = submit(client, prompt="a dog fake:block=4")["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
        stack.worker(**FAST_LEASE)
        job = ended(client, job_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 1)


def test_a_crash_is_no_matter_for_the_next_worker(stack: Stack) -> None:
    """`fake:crash` kills its process; a build without the fault makes the picture."""
    crashing = stack.worker(**FAST_LEASE)
    with stack.gateway().client() as client:
        job_id = submit(client, prompt="a dog fake:crash")["id"]
        assert crashing.wait() == -9
        stack.worker(**MENDED)
        assert ended(client, job_id)["state"] == "succeeded"


STUCK_LOAD = """
import asyncio
from img2img import telemetry
from img2img.settings import Settings
from worker.engines.fake import FakeEngine
from worker.main import serve
from worker.watchdog import Watchdog

class StuckEngine(FakeEngine):
    async def __aenter__(self):
        await asyncio.Event().wait()

telemetry.configure_logging("info", "json")
with Watchdog(60.0, 0.5) as watchdog:
    asyncio.run(serve(Settings.from_environment(), StuckEngine(), watchdog))
"""
# A pattern that takes years to find that it does not match, and never lets another thread run.
STUCK_INTERPRETER = """
import re
from worker.watchdog import Watchdog

with Watchdog(0.5, 0.5):
    re.match(r"(a+)+$", 50 * "a" + "b")
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_a_model_that_never_finishes_loading_is_noticed(valkey_url: str) -> None:
    """Before the worker is known to anybody, its engine hangs."""
    process = run(STUCK_LOAD, IMG2IMG_REDIS_URL=valkey_url)
    assert process.returncode == STALLED_STATUS
    assert '"what": "loading the model"' in process.stderr


def test_native_code_that_keeps_the_interpreter_is_ended() -> None:
    """Nothing written in Python runs any more; the stacks are shown all the same."""
    process = run(STUCK_INTERPRETER)
    assert process.returncode == 1
    assert "in match" in process.stderr


class Line:
    """A TCP line to the queue server whose connections can fall silent: they stay open, and nothing gets through."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._silent: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        self._open |= {writer, back}
        await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))

    def silence(self) -> None:
        """What is connected now never hears anything again; new connections do."""
        self._silent |= self._open

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if writer not in self._silent:
                    writer.write(data)
        writer.close()


async def test_silent_connections_are_replaced_before_the_lease_is_over(stack: Stack, valkey_url: str) -> None:
    """The network swallows all that a worker says: it beats on another connection, and its job stays its own."""
    line = Line(valkey_url.removeprefix("unix://"))
    async with await asyncio.start_server(line.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        cut_off = await asyncio.to_thread(stack.worker, redis_url=f"redis://127.0.0.1:{port}/0", **PATIENT_LEASE)
        gateway = await asyncio.to_thread(stack.gateway)
        with gateway.client() as client:
            job_id = (await asyncio.to_thread(submit, client, prompt="a dog fake:step=1.2", num_steps=4))["id"]
            await asyncio.to_thread(eventually, lambda: state_of(client, job_id) == "running", "running")
            line.silence()
            await asyncio.to_thread(stack.worker, **PATIENT_LEASE)
            job = await asyncio.to_thread(ended, client, job_id)
        await asyncio.to_thread(cut_off.close)
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert "beat_failed" in cut_off.log.read_text()


async def test_a_heart_that_breaks_is_noticed(valkey_url: str) -> None:
    """Anything but an unreachable server ends the heart, and whoever waits for it gets the error."""
    settings = Settings(redis_url=valkey_url, lease=0.6, beat=0.2)
    async with Heart("default", WorkerInfo("one", 1, "fake", "fake", "cpu"), settings, print) as heart:
        heart.held = ("no claim",)  # type: ignore[assignment]
        with pytest.raises(AttributeError):
            await heart.beating()
