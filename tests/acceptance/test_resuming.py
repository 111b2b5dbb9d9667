"""Workers die or leave in mid-job: another goes on where they were, and makes the same picture."""

import json
import signal
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest
from redis import Redis

from tests.stack import Process, Stack, ended, eventually, state_of, submit

FAST_LEASE = {"lease": "2", "beat": "0.5", "progress_interval": "0", "fake_step_seconds": "0.05"}
SLOW = {**FAST_LEASE, "fake_step_seconds": "0.3"}
"""A worker that does not get through a job before it is killed, or stopped, in the middle of it."""
JOB: dict[str, Any] = {"prompt": "a dog", "num_steps": 20, "seed": 7}
FEW = 3
BLOBS = "img2img:{0}:blob:"
UNRECORDED_SECONDS = 120
"""What no record names is gone by then."""


@pytest.fixture
def server(valkey_url: str) -> Iterator[Redis]:
    with Redis.from_url(valkey_url) as server:
        yield server


def recorded(server: Redis, job_id: str) -> dict[str, Any]:
    """The checkpoint that the job's record names."""
    raw = server.hget(f"img2img:{{0}}:job:{job_id}", "checkpoint")
    return {} if raw is None else json.loads(raw)


def steps_told(client: httpx.Client, job_id: str, attempt: int) -> list[int]:
    """The steps that an attempt's events tell of; those that came while another one was on its way are not told."""
    found: list[int] = []
    number = 0
    for line in client.get(f"/v1/jobs/{job_id}/events").text.splitlines():
        event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
        number += event.get("type") == "running"
        if number == attempt and event.get("stage") == "steps":
            found.append(event["step"])
    return found


def picture(client: httpx.Client, job_id: str) -> bytes:
    job = ended(client, job_id)
    assert job["state"] == "succeeded", job
    return client.get(f"/v1/jobs/{job_id}/image").content


def logged(worker: Process, event: str) -> list[dict[str, Any]]:
    return [entry for entry in worker.entries() if entry.get("event") == event]


def left_behind(server: Redis) -> list[bytes]:
    """Checkpoints that would stay for longer than it takes to record one."""
    return [key for key in server.keys(f"{BLOBS}checkpoint:*") if server.ttl(key) > UNRECORDED_SECONDS]


def interrupted(stack: Stack, client: httpx.Client, server: Redis) -> str:
    """A job that a worker's shutdown has interrupted; the only checkpoint is the one of that moment."""
    leaving = stack.worker(drain_timeout="0", checkpoint_interval="0", **SLOW)
    job_id = submit(client, **JOB)["id"]
    eventually(lambda: (client.get(f"/v1/jobs/{job_id}").json()["step"] or 0) >= FEW, "some steps are done")
    assert recorded(server, job_id) == {}
    leaving.signal(signal.SIGTERM)
    assert leaving.wait() == 0
    assert [entry for entry in leaving.entries() if entry.get("level") == "error"] == []
    assert state_of(client, job_id) == "queued"
    return job_id


def test_a_killed_workers_job_goes_on_from_its_checkpoint(stack: Stack, server: Redis) -> None:
    """SIGKILL in mid-job: the next attempt begins above step 0, and nobody can tell from the picture."""
    first = stack.worker(checkpoint_interval="0.05", **SLOW)
    with stack.gateway().client() as client:
        job_id = submit(client, **JOB)["id"]
        eventually(lambda: recorded(server, job_id).get("step", 0) >= FEW, "a checkpoint is recorded")
        first.kill()
        step = recorded(server, job_id)["step"]
        second = stack.worker(checkpoint_interval="0.05", **FAST_LEASE)
        resumed = picture(client, job_id)
        job = client.get(f"/v1/jobs/{job_id}").json()
        assert (job["attempt"], job["crashes"]) == (2, 1)
        assert min(steps_told(client, job_id, 2), default=step) >= step
        assert [entry["step"] for entry in logged(second, "job_resumed")] == [step]
        created, finished = (datetime.fromisoformat(job[name]).timestamp() for name in ("created_at", "finished_at"))
        assert sum(job["timings"].values()) <= finished - created + 0.005
        assert resumed == picture(client, submit(client, **JOB)["id"])
        eventually(lambda: left_behind(server) == [], "upkeep has deleted the checkpoints")


def test_a_stopped_workers_job_goes_on_without_losing_an_attempt(stack: Stack, server: Redis) -> None:
    """SIGTERM in mid-job, with the only attempt that it has: the engine ends its step and leaves a checkpoint."""
    with stack.gateway(attempts="1", crash_limit="1").client() as client:
        job_id = interrupted(stack, client, server)
        step = recorded(server, job_id)["step"]
        assert step >= FEW
        stack.worker(**FAST_LEASE)
        resumed = picture(client, job_id)
        job = client.get(f"/v1/jobs/{job_id}").json()
        assert (job["attempt"], job["interruptions"], job["failures"], job["crashes"]) == (2, 1, 0, 0)
        assert min(steps_told(client, job_id, 2), default=step) >= step
        assert resumed == picture(client, submit(client, **JOB)["id"])
        eventually(lambda: left_behind(server) == [], "upkeep has deleted the checkpoint")


@pytest.mark.parametrize("damage", ["missing", "unreadable"])
def test_without_its_checkpoint_a_job_begins_anew(stack: Stack, server: Redis, damage: str) -> None:
    """The log says so, and nothing is lost but time."""
    with stack.gateway().client() as client:
        job_id = interrupted(stack, client, server)
        key = BLOBS + recorded(server, job_id)["blob"]
        if damage == "missing":
            server.delete(key)
        else:
            server.set(key, b"\xff", keepttl=True)
        second = stack.worker(**FAST_LEASE)
        anew = picture(client, job_id)
        assert logged(second, "job_resumed") == []
        assert len(logged(second, "checkpoint_missing" if damage == "missing" else "checkpoint_unfit")) == 1
        assert anew == picture(client, submit(client, **JOB)["id"])


@pytest.mark.timeout(600)
def test_a_killed_diffusion_workers_job_goes_on_to_the_same_bytes(stack: Stack, server: Redis) -> None:
    """With a real model, in mid-image: the file is the same to the last byte, where that was asked for."""
    job: dict[str, Any] = {
        "prompt": "Change to a lion",
        "seed": 1,
        "guidance": 3.5,
        "width": 512,
        "height": 512,
        "num_steps": 20,
        "options": {"reproducible": True, "sampler": "euler_a"},
    }
    first = stack.worker(engine="diffusion", device="cpu", checkpoint_interval="0.05", **FAST_LEASE)
    with stack.gateway().client() as client:
        job_id = submit(client, **job)["id"]
        eventually(lambda: recorded(server, job_id).get("step", 0) >= FEW, "a checkpoint is recorded")
        first.kill()
        step = recorded(server, job_id)["step"]
        stack.worker(engine="diffusion", device="cpu", **FAST_LEASE)
        resumed = picture(client, job_id)
        assert min(steps_told(client, job_id, 2), default=step) >= step
        again = submit(client, **job)["id"]
        assert resumed == picture(client, again)
        receipts = [client.get(f"/v1/jobs/{one}").json()["result"]["receipt"] for one in (job_id, again)]
        assert receipts[0] == receipts[1]
        assert receipts[0]["rows"] > 0
