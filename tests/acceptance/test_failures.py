"""Processes die, stop and come back; no job is stuck, none is run by nobody, no result is doubled."""

import signal
from pathlib import Path

import pytest
from redis import Redis

from tests.stack import Stack, ended, eventually, state_of, submit

FAST_LEASE = {"lease": "1.5", "beat": "0.4"}
ENDLESS, SLOW = "a dog fake:step=5", "a dog fake:step=0.1"


def test_a_killed_workers_job_is_run_by_another(stack: Stack) -> None:
    """SIGKILL in mid-job: the lease runs out, another worker runs the job, the log tells it."""
    first = stack.worker(**FAST_LEASE)
    with stack.gateway().client() as client:
        job_id = submit(client, prompt=SLOW)["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
        first.kill()
        stack.worker(**FAST_LEASE)
        job = ended(client, job_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 2)
        log = client.get(f"/v1/jobs/{job_id}/events").text
        assert "worker_lost" in log
        assert client.get("/v1/queue").json()["running"] == 0


def test_a_stopped_worker_cannot_overwrite(stack: Stack) -> None:
    """SIGSTOP past the lease, SIGCONT: the job was run elsewhere, and the late result is discarded."""
    sleeper = stack.worker(**FAST_LEASE)
    with stack.gateway().client() as client:
        job_id = submit(client, prompt=SLOW)["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
        sleeper.signal(signal.SIGSTOP)
        stack.worker(**FAST_LEASE)
        job = ended(client, job_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 2)
        sleeper.signal(signal.SIGCONT)
        eventually(
            lambda: any(entry.get("event") in ("lease_lost", "result_discarded") for entry in sleeper.entries()),
            "the stopped worker notices that it was fenced",
        )
        assert client.get(f"/v1/jobs/{job_id}").json() == job


def test_a_worker_may_get_its_own_lost_job_again(stack: Stack, valkey_url: str) -> None:
    """The server stalls past the lease: the worker's free slot claims the job that its other slot still runs."""
    stack.worker(concurrency="2", **FAST_LEASE)
    with stack.gateway().client() as client, Redis.from_url(valkey_url) as redis:
        job_id = submit(client, prompt="a dog fake:step=0.2")["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
        redis.client_pause(2500, all=True)
        job = ended(client, job_id)
        assert job["state"] == "succeeded"
        assert job["attempt"] <= 2
        after = submit(client, prompt="a dog")["id"]
        assert ended(client, after)["state"] == "succeeded"
        assert client.get("/v1/queue").json()["running"] == 0


def test_a_worker_that_is_asked_to_stop_hands_its_job_back(stack: Stack) -> None:
    """SIGTERM: what cannot finish within the drain limit goes back at once, without losing an attempt."""
    leaving = stack.worker(drain_timeout="0.2", attempts="1")
    with stack.gateway(attempts="1").client() as client:
        job_id = submit(client, prompt=ENDLESS)["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
        leaving.signal(signal.SIGTERM)
        assert leaving.wait() == 0
        assert state_of(client, job_id) == "queued"
        stack.worker()
        eventually(lambda: state_of(client, job_id) == "running", "running again, with its only attempt")
        client.post(f"/v1/jobs/{job_id}/cancel")


def test_a_worker_that_is_asked_to_stop_finishes_what_it_can(stack: Stack) -> None:
    """SIGTERM with time enough: the running job ends there, the next one is not taken."""
    leaving = stack.worker()
    with stack.gateway().client() as client:
        running, waiting = (submit(client, prompt="a dog fake:step=0.2")["id"] for _ in range(2))
        eventually(lambda: state_of(client, running) == "running", "running")
        leaving.signal(signal.SIGTERM)
        assert leaving.wait() == 0
        job = client.get(f"/v1/jobs/{running}").json()
        assert (job["state"], job["attempt"]) == ("succeeded", 1)
        assert state_of(client, waiting) == "queued"
        client.post(f"/v1/jobs/{waiting}/cancel")


def test_a_restarted_gateway_knows_everything(stack: Stack) -> None:
    """A gateway killed in mid-job holds nothing that matters: a new one shows the job and its picture."""
    stack.worker()
    first = stack.gateway()
    with first.client() as client:
        job_id = submit(client, prompt=SLOW)["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
    first.kill()
    with stack.gateway().client() as client:
        assert ended(client, job_id)["state"] == "succeeded"
        assert client.get(f"/v1/jobs/{job_id}/image").status_code == 200


def test_a_job_that_fails_is_tried_again_and_then_fails(stack: Stack) -> None:
    """Attempts that fail are repeated with back-off; a refusal by the model is not."""
    stack.worker(retry_delay="0.01")
    with stack.gateway().client() as client:
        recovered = submit(client, prompt="a dog fake:fail=1")["id"]
        failing = submit(client, prompt="a dog fake:fail")["id"]
        refused = submit(client, prompt="a dog fake:refuse")["id"]
        jobs = [ended(client, job) for job in (recovered, failing, refused)]
    assert [(job["state"], job["attempt"]) for job in jobs] == [("succeeded", 2), ("failed", 3), ("failed", 1)]
    assert [job["error"] and job["error"]["code"] for job in jobs] == [None, "engine_failed", "model_refused"]


def test_a_running_job_ends_at_its_deadline(stack: Stack) -> None:
    """The deadline stops a running job and a queued one alike, both as `expired`."""
    stack.worker()
    with stack.gateway(refuse_late="false").client() as client:
        limit = {"deadline_seconds": 0.5}
        running = submit(client, prompt=ENDLESS, options=limit)["id"]
        queued = submit(client, prompt=ENDLESS, options=limit)["id"]
        for job_id in (running, queued):
            assert ended(client, job_id)["state"] == "expired"


def test_an_attempt_has_a_limit_of_its_own(stack: Stack) -> None:
    """An attempt that takes longer than allowed ends the job with a code of its own."""
    stack.worker(attempt_timeout="0.3")
    with stack.gateway().client() as client:
        job_id = submit(client, prompt=ENDLESS)["id"]
        job = ended(client, job_id)
    assert (job["state"], job["error"]["code"]) == ("failed", "attempt_timeout")


def test_a_cancel_stops_a_running_job_within_a_step(stack: Stack) -> None:
    """The worker is free for the next job although the canceled one had minutes of steps left."""
    stack.worker()
    with stack.gateway().client() as client:
        endless = submit(client, prompt="a dog fake:step=0.2")["id"]
        eventually(lambda: state_of(client, endless) == "running", "running")
        client.post(f"/v1/jobs/{endless}/cancel")
        after = submit(client, prompt="a dog")["id"]
        assert ended(client, after)["state"] == "succeeded"
        canceled = client.get(f"/v1/jobs/{endless}").json()
    assert (canceled["state"], canceled["error"]["code"]) == ("canceled", "canceled")


def test_a_late_word_to_stop_stops_no_later_attempt(stack: Stack, valkey_url: str) -> None:
    """A cancel that reaches the worker when the job was replayed meanwhile: its record says that it may go on."""
    worker = stack.worker()
    with stack.gateway().client() as client, Redis.from_url(valkey_url) as redis:
        job_id = submit(client, prompt=SLOW)["id"]
        eventually(lambda: state_of(client, job_id) == "running", "running")
        told = f"img2img:{{0}}:control:{worker.wait_ready()['worker']}"
        redis.rpush(told, f"{job_id} user")
        eventually(lambda: not redis.exists(told), "the worker has heard it")
        assert ended(client, job_id)["state"] == "succeeded"


def test_inputs_are_deleted_with_their_job(stack: Stack, tmp_path: Path) -> None:
    """With files as blob store: the input goes when the job has ended, the picture stays."""
    folder = tmp_path / "blobs with a space"
    blobs = {"blobs": folder.as_uri()}
    stack.worker(**blobs)
    with stack.gateway(**blobs).client() as client:
        image = list((Path(__file__).parents[2] / "examples" / "dog.png").read_bytes())
        job_id = submit(client, prompt="a dog", image=image, strength=0.5)["id"]
        assert ended(client, job_id)["state"] == "succeeded"
        eventually(lambda: kinds(folder) == {"result"}, "the input is deleted")
        assert client.get(f"/v1/jobs/{job_id}/image").status_code == 200


def kinds(folder: Path) -> set[str]:
    """What kinds of blobs there are: keys begin with their kind."""
    return {path.name.partition(":")[0] for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_only_loopback_is_served(stack: Stack, host: str) -> None:
    """A gateway without a tenants file refuses to bind where others could reach it, and says the remedy."""
    with pytest.raises(AssertionError, match="IMG2IMG_TENANTS_FILE"):
        stack.gateway(host=host)
