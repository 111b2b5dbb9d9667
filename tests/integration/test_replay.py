"""Jobs that are run again under their ids: after a quarantine, over every front end, and as their watchers see it."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
import redis

from img2img.client import Client
from img2img.client.channel import client_error
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import picture, problem
from tests.stack import Gateway, Process, Stack, eventually, state_of, submit
from tests.up.running import run

WAYS = ("http", "grpc", "cli")
DEADLY = "fake:crash fake:step=0.5"
"""The worker is known to be ready before it dies."""
QUICK = {"lease": "1", "beat": "0.2", "retry_delay": "0.01"}


@pytest.fixture(scope="module")
def stack(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack"), **QUICK) as stack:
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Gateway:
    return stack.gateway()


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture(scope="module")
def stub(gateway: Gateway) -> Iterator[Any]:
    with grpc.insecure_channel(gateway.grpc) as channel:
        yield Img2ImgServiceStub(channel)


@pytest.fixture
def worker(stack: Stack) -> Iterator[Process]:
    """One whose engine is mended."""
    worker = stack.worker(fake_obeys="false")
    yield worker
    worker.close()


def replay(way: str, gateway: Gateway, job_id: str) -> tuple[str, int]:
    """The state and the number of replays that the answer shows, or the error's code and its status."""
    if way == "http":
        with gateway.client() as client:
            answer = client.post(f"/v1/jobs/{job_id}/replay")
        body = answer.json()
        return (body["state"], body["replays"]) if answer.is_success else (body["code"], answer.status_code)
    if way == "cli":
        ended = run("jobs", "replay", job_id, "--json", IMG2IMG_SERVER=gateway.grpc)
        if ended.returncode:
            return ended.stderr.rpartition("[")[2].strip().rstrip("]"), ended.returncode
        body = json.loads(ended.stdout)
        return body["state"], body["replays"]
    with grpc.insecure_channel(gateway.grpc) as channel:
        stub: Any = Img2ImgServiceStub(channel)
        try:
            job = stub.ReplayJob(pb.ReplayJobRequest(id=job_id)).job
        except grpc.RpcError as exc:
            return client_error(exc, gateway.grpc).code, exc.code().value[0]
    return pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower(), job.replays


def events(client: httpx.Client, job_id: str, seen: Callable[[dict[str, Any]], None] = id) -> list[dict[str, Any]]:
    """The stream's events up to its end, each told to ``seen``."""
    found = []
    with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                seen(found[-1])
    return found


def done(client: httpx.Client, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()
    return job


@pytest.fixture(scope="module")
def deadly(stack: Stack, client: httpx.Client) -> dict[str, str]:
    """A job per way of replaying it, in quarantine: the first death takes all, then each dies alone."""
    picture_ = list(picture())
    ids = {way: submit(client, prompt=f"{DEADLY} {way}", num_steps=1, image=picture_)["id"] for way in WAYS}
    workers = [stack.worker(concurrency="3")]
    workers[0].wait()
    for _ in WAYS:
        eventually(lambda: client.get("/v1/queue").json()["running"] == 0, "the lease has run out")
        workers.append(stack.worker())
        workers[-1].wait()
    for job_id in ids.values():
        assert done(client, job_id)["state"] == "failed"
    return ids


def test_the_history_of_a_quarantined_job(
    client: httpx.Client, stub: Any, gateway: Gateway, deadly: dict[str, str]
) -> None:
    """Two deaths of two workers, then the end; no other job's worker is found guilty."""
    assert client.get("/v1/queue").json()["quarantined"] == len(WAYS)
    assert f'state="quarantined"}} {len(WAYS)}.0' in client.get("/metrics").text
    job_id = deadly["http"]
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["error"]["code"], job["crashes"], job["failures"], job["attempt"]) == ("quarantined", 2, 0, 2)
    assert [(past["attempt"], past["error"]["code"]) for past in job["history"]] == [
        (1, "worker_lost"),
        (2, "worker_lost"),
    ]
    assert len({past["worker"] for past in job["history"]}) == 2
    assert all(past["started_at"] < past["ended_at"] for past in job["history"])
    message = stub.GetJob(pb.GetJobRequest(id=job_id)).job
    assert (message.error.code, message.crashes) == ("quarantined", 2)
    assert [(past.attempt, past.error.code) for past in message.history] == [(1, "worker_lost"), (2, "worker_lost")]
    text = run("jobs", "get", job_id, IMG2IMG_SERVER=gateway.grpc).stdout
    assert "[quarantined]" in text
    assert text.count("[worker_lost]") == 2
    assert "attempt 1    2" in text
    problem(client.get(f"/v1/jobs/{job_id}/image"), 409, "result_not_ready")


@pytest.mark.parametrize("way", WAYS)
def test_a_quarantined_job_runs_when_all_is_mended(
    client: httpx.Client, gateway: Gateway, deadly: dict[str, str], worker: Process, way: str
) -> None:
    """Under its id, with its input picture, from counts that begin anew; log, history and attempts go on."""
    job_id = deadly[way]
    before = client.get(f"/v1/jobs/{job_id}").json()
    state, replays = replay(way, gateway, job_id)
    assert (state in ("queued", "running", "succeeded"), replays) == (True, 1)
    job = done(client, job_id)
    assert (job["state"], job["attempt"], job["crashes"], job["replays"]) == ("succeeded", 3, 0, 1)
    assert (job["error"], job["history"]) == (None, before["history"])
    assert client.get(job["links"]["image"]).status_code == 200
    found = events(client, job_id)
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    marks = [(event["type"], event.get("replays")) for event in found if event["type"] != "progress"]
    assert marks == [
        ("queued", None), ("running", None), ("queued", None), ("running", None), ("failed", None),
        ("queued", 1), ("running", None), ("succeeded", None),
    ]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_replayed(client: httpx.Client, gateway: Gateway, stack: Stack, way: str) -> None:
    """A queued job goes on as it is; one that succeeded, or that there is none of, is refused."""
    job_id = submit(client, prompt="x")["id"]
    assert replay(way, gateway, job_id) == ("queued", 0)
    worker = stack.worker()
    log = events(client, job_id)
    assert [event["type"] for event in log if event["type"] != "progress"] == ["queued", "running", "succeeded"]
    conflict, missing = {"http": (409, 404), "grpc": (9, 5), "cli": (1, 1)}[way]
    assert replay(way, gateway, job_id) == ("not_replayable", conflict)
    assert replay(way, gateway, f"{job_id[:-4]}0000") == ("job_not_found", missing)
    assert events(client, job_id) == log
    running = submit(client, prompt="fake:step=60")["id"]
    eventually(lambda: state_of(client, running) == "running", "the job has begun")
    assert replay(way, gateway, running) == ("running", 0)
    client.post(f"/v1/jobs/{running}/cancel")
    assert done(client, running)["state"] == "canceled"
    worker.close()


def test_a_job_whose_input_is_gone_is_not_replayed(client: httpx.Client, gateway: Gateway, valkey_url: str) -> None:
    """Its picture was deleted with its end, as ``IMG2IMG_INPUT_RETENTION`` says; one without a picture can always."""
    job = submit(client, prompt="x", image=list(picture()))
    client.post(job["links"]["cancel"])
    with redis.Redis.from_url(valkey_url) as server:
        eventually(lambda: not server.keys(f"*input:{job['id']}*"), "the input is deleted")
    problem(client.post(job["links"]["replay"]), 409, "not_replayable")
    assert [replay(way, gateway, job["id"])[0] for way in WAYS] == ["not_replayable"] * 3
    other = submit(client, prompt="x")
    client.post(other["links"]["cancel"])
    answer = client.post(other["links"]["replay"])
    assert (answer.status_code, answer.json()["state"], answer.json()["error"]) == (200, "queued", None)
    client.post(other["links"]["cancel"])


def test_several_jobs_are_replayed_by_one_command(client: httpx.Client, gateway: Gateway) -> None:
    """Those that can be are; the others are named, and the exit code tells."""
    ids = [submit(client, prompt="x")["id"] for _ in range(2)]
    for job_id in ids:
        client.post(f"/v1/jobs/{job_id}/cancel")
    ended = run("jobs", "replay", ids[0], "0-1", ids[1], IMG2IMG_SERVER=gateway.grpc)
    assert ended.returncode == 1
    assert [line.partition(",")[0] for line in ended.stdout.splitlines()] == [f"{job_id} queued" for job_id in ids]
    assert ended.stderr.count("Error: ") == 1
    assert "[job_not_found]" in ended.stderr
    for job_id in ids:
        client.post(f"/v1/jobs/{job_id}/cancel")


def test_watchers_see_only_the_last_end(client: httpx.Client, gateway: Gateway, stub: Any, stack: Stack) -> None:
    """Whoever watches a replayed job from its beginning passes its first end and stays for the second."""
    job_id = submit(client, prompt="x")["id"]
    client.post(f"/v1/jobs/{job_id}/cancel")
    assert client.post(f"/v1/jobs/{job_id}/replay").json()["replays"] == 1
    passed = threading.Barrier(4, timeout=60)

    def look(replays: int | None) -> None:
        if replays:
            passed.wait()

    def by_sse() -> list[str]:
        return [event["type"] for event in events(client, job_id, lambda event: look(event.get("replays")))]

    def by_grpc() -> list[str]:
        found = []
        for event in stub.WatchJob(pb.WatchJobRequest(id=job_id)):
            found.append(event.type)
            look(event.replays)
        return found

    def by_client() -> list[str]:
        found = []
        with Client(gateway.grpc) as plain:
            for event in plain.watch(job_id):
                found.append(event.type)
                look(event.replays)
        return found

    with ThreadPoolExecutor(4) as pool:
        waiting = pool.submit(done, client, job_id)
        watching = [pool.submit(watch) for watch in (by_sse, by_grpc, by_client)]
        passed.wait()
        worker = stack.worker()
        for watch in watching:
            types = [kind for kind in watch.result(60) if kind != "progress"]
            assert types == ["queued", "canceled", "queued", "running", "succeeded"]
        assert waiting.result(60)["state"] == "succeeded"
    shown = run("jobs", "watch", job_id, IMG2IMG_SERVER=gateway.grpc).stdout.splitlines()
    assert shown[2].endswith("queued (replay 1)")
    assert " succeeded" in shown[-1]
    worker.close()
