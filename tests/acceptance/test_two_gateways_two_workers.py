"""Two gateways and two workers as real processes: whatever one was told, the other knows."""

import json
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from img2img.client import Client
from tests.stack import DOG, MODEL_PATH, Gateway, Stack, ended, eventually, state_of, submit

RUN = MODEL_PATH.format(account="local")
JOB_HEADER = "img2img-job-id"
QUICK, SLOW, ENDLESS = "a dog", "a dog fake:step=0.1", "a dog fake:step=5"


class Pair:
    """Two gateways with an HTTP client each."""

    def __init__(self, gateways: tuple[Gateway, Gateway], clients: tuple[httpx.Client, httpx.Client]) -> None:
        self.gateways = gateways
        self.one, self.two = clients


@pytest.fixture(scope="module")
def pair(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    settings = {"sync_timeout": "1", "retry_grace": "5"}
    with Stack(valkey_url, tmp_path_factory.mktemp("stack"), **settings) as stack:
        for _ in range(2):
            stack.worker()
        gateways = stack.gateway(), stack.gateway()
        with gateways[0].client() as one, gateways[1].client() as two:
            yield Pair(gateways, (one, two))


def run(client: httpx.Client, prompt: str, retry: int = 0, **headers: str) -> httpx.Response:
    body = {"prompt": prompt, "seed": 7}
    return client.post(RUN, json=body, headers={"x-stainless-retry-count": str(retry), **headers})


def test_both_workers_take_jobs(pair: Pair) -> None:
    """Both are known to both gateways, and two slow jobs run at the same time."""
    assert len(pair.one.get("/v1/queue").json()["workers"]) == 2
    jobs = [submit(client, prompt=f"{ENDLESS} {n}")["id"] for n, client in enumerate((pair.one, pair.two))]
    for job_id in jobs:
        eventually(lambda job_id=job_id: state_of(pair.two, job_id) == "running", "running")
    for job_id in jobs:
        pair.one.post(f"/v1/jobs/{job_id}/cancel")
        eventually(lambda job_id=job_id: state_of(pair.two, job_id) == "canceled", "canceled")


def test_a_retried_post_joins_across_gateways(pair: Pair) -> None:
    """A call that times out on one gateway is retried on the other: the same job, one run, its picture."""
    first = run(pair.one, SLOW)
    assert first.status_code == 408
    assert first.json()["errors"][0]["code"] == 3007
    for number, client in enumerate(cycle((pair.two, pair.one)), 1):
        retry = run(client, SLOW, retry=number)
        if retry.status_code != 408:
            break
    assert retry.headers["content-type"] == "image/png"
    job = pair.one.get(f"/v1/jobs/{retry.headers[JOB_HEADER]}").json()
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert [job["id"] for job in jobs_with(pair.one, SLOW)] == [retry.headers[JOB_HEADER]]


def test_a_job_that_nobody_waits_for_is_canceled(pair: Pair) -> None:
    """After a disconnect and the grace period the job ends; a retry within it would have kept it."""
    prompt = f"{ENDLESS} abandoned"
    body = json.dumps({"prompt": prompt}).encode()
    host, port = pair.gateways[0].http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as caller:
        caller.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (RUN.encode(), len(body), body))
        job = eventually(lambda: jobs_with(pair.two, prompt), "the job exists")[0]
    eventually(lambda: state_of(pair.two, job["id"]) == "canceled", "canceled after the grace period")


def test_idempotency_across_gateways(pair: Pair) -> None:
    """The same key and body give the same job on either gateway and route; another body is refused."""
    headers = {"idempotency-key": "across"}
    with ThreadPoolExecutor(8) as pool:
        clients = [pair.one, pair.two] * 4
        answers = list(pool.map(lambda c: c.post("/v1/jobs", json={"prompt": QUICK}, headers=headers), clients))
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = pair.two.post("/v1/jobs", json={"prompt": "a cat"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


def test_cancel_across_gateways(pair: Pair) -> None:
    """A running job that one gateway accepted is canceled through the other; twice is once."""
    job_id = submit(pair.one, prompt=ENDLESS)["id"]
    eventually(lambda: state_of(pair.two, job_id) == "running", "running")
    assert pair.two.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
    eventually(lambda: state_of(pair.one, job_id) == "canceled", "canceled")
    assert pair.one.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "canceled"


def test_watch_across_gateways(pair: Pair) -> None:
    """SSE on one gateway and WatchJob on the other show the same numbered log, without gaps."""
    job_id = submit(pair.one, prompt=f"{SLOW} watched")["id"]
    with Client(pair.gateways[1].grpc) as client:
        over_grpc = [(event.sequence, event.type) for event in client.watch(job_id)]
    over_sse = sse(pair.one, job_id)
    assert [(number, kind) for number, kind, _ in over_sse] == over_grpc
    assert [number for number, _ in over_grpc] == list(range(1, len(over_grpc) + 1))
    assert over_grpc[-1][1] == "succeeded"
    assert sse(pair.two, job_id, after=3) == over_sse[3:]


def test_long_poll_and_get_across_gateways(pair: Pair) -> None:
    """A long-poll on one gateway returns when the job of the other has ended; both show the same."""
    job_id = submit(pair.one, prompt=f"{SLOW} polled")["id"]
    polled = ended(pair.two, job_id)
    assert polled["state"] == "succeeded"
    assert pair.one.get(f"/v1/jobs/{job_id}").json() == polled
    assert pair.one.get(polled["links"]["image"]).content == pair.two.get(polled["links"]["image"]).content


def test_the_same_seed_gives_the_same_bytes_everywhere(pair: Pair) -> None:
    """An image as integers, as base64 and as gRPC bytes gives the same picture on any gateway and worker."""
    data, want = DOG.read_bytes(), {"prompt": QUICK, "seed": 3, "strength": 0.5}
    pictures = {pair.one.post(RUN, json={**want, "image": list(data)}).content}
    pictures.add(pair.two.post(RUN, json={**want, "image_b64": b64encode(data).decode()}).content)
    for gateway in pair.gateways:
        with Client(gateway.grpc) as client:
            pictures.add(client.generate(prompt=QUICK, seed=3, strength=0.5, image=data).data)
    assert len(pictures) == 1


def test_a_drained_gateway_lets_watchers_resume_elsewhere(valkey_url: str, tmp_path: Path) -> None:
    """SIGTERM ends a stream between events; the rest is read from the other gateway."""
    with Stack(valkey_url, tmp_path) as stack:
        stack.worker()
        leaving, staying = stack.gateway(), stack.gateway()
        with leaving.client() as one, staying.client() as two:
            job_id = submit(one, prompt="a dog fake:step=0.2")["id"]
            eventually(lambda: state_of(two, job_id) == "running", "running")
            watching = threading.Event()
            with ThreadPoolExecutor(1) as pool:
                watcher = pool.submit(sse, one, job_id, opened=watching.set)
                assert watching.wait(30)
                leaving.close()
                seen = watcher.result()
            rest = sse(two, job_id, after=len(seen))
    assert [number for number, _, _ in seen + rest] == list(range(1, len(seen) + len(rest) + 1))
    assert rest[-1][1] == "succeeded"


def jobs_with(client: httpx.Client, prompt: str) -> list[dict[str, Any]]:
    jobs = client.get("/v1/jobs", params={"limit": 100}).json()["jobs"]
    return [job for job in jobs if job["parameters"]["prompt"] == prompt]


def sse(
    client: httpx.Client, job_id: str, after: int = 0, opened: Callable[[], None] = lambda: None
) -> list[tuple[int, str, str]]:
    """Number, type and data of every event that the stream sends until it ends; ``opened`` is called when it begins."""
    headers = {"last-event-id": str(after)} if after else {}
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as stream:
        opened()
        text = "".join(stream.iter_text()).replace("\r\n", "\n")
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != ":")
        if "id" in fields:
            found.append((int(fields["id"]), fields["event"], fields["data"]))
    return found
