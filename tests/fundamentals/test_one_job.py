"""The tutorial: what one can do with a job, from the first picture to the last detail. Read it from the top."""

from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256

import httpx
import pytest

from img2img.client import Client, ClientError
from tests.stack import DOG, MODEL_PATH, Gateway, Stack, eventually, state_of


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        stack.worker()
        yield stack.gateway()


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture
def grpc(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.grpc) as client:
        yield client


def test_a_prompt_gives_a_picture(http: httpx.Client) -> None:
    """Cloudflare's route: JSON in, PNG out, in one call."""
    answer = http.post(MODEL_PATH.format(account="local"), json={"prompt": "cyberpunk cat"})
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")


def test_a_picture_can_be_changed(grpc: Client) -> None:
    """gRPC Generate: bytes in, bytes out; `strength` says how much may change."""
    picture = grpc.generate(image=DOG.read_bytes(), prompt="Change to a lion", strength=0.9, seed=1)
    assert picture.data.startswith(b"\x89PNG")
    assert picture.job.seed == 1


def test_a_job_runs_while_you_do_something_else(http: httpx.Client) -> None:
    """The native API: create a job, look at it, fetch its picture when it is done."""
    created = http.post("/v1/jobs", json={"prompt": "a lion", "options": {"output_format": "webp"}})
    assert created.status_code == 202
    job = http.get(created.headers["location"], params={"wait": 30}).json()
    assert job["state"] == "succeeded"
    picture = http.get(job["links"]["image"])
    assert picture.headers["content-type"] == "image/webp"


def test_a_file_can_be_uploaded(http: httpx.Client) -> None:
    """The same fields as a form; `Prefer: wait` waits in the same call."""
    job = http.post(
        "/v1/jobs",
        data={"prompt": "a lion", "strength": "0.5"},
        files={"image": DOG.read_bytes()},
        headers={"prefer": "wait=30"},
    ).json()
    assert job["state"] == "succeeded"
    shown = {"format": "PNG", "width": 256, "height": 256, "bytes": DOG.stat().st_size}
    assert job["parameters"]["image"] == shown | {"sha256": sha256(DOG.read_bytes()).hexdigest()}


def test_a_job_can_be_watched(grpc: Client) -> None:
    """Every watcher sees the same numbered events, and can go on where it stopped."""
    job = grpc.create(prompt="a lion fake:step=0.05")
    events = list(grpc.watch(job.id))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [events[0].type, events[1].type, events[-1].type] == ["queued", "running", "succeeded"]
    assert {event.type for event in events[2:-1]} == {"progress"}
    assert list(grpc.watch(job.id, after=3)) == events[3:]


def test_a_job_can_be_canceled(http: httpx.Client) -> None:
    """In any state, as often as you like; a running one stops within a step."""
    job = http.post("/v1/jobs", json={"prompt": "a lion fake:step=5"}).json()
    for _ in range(2):
        assert http.post(job["links"]["cancel"]).status_code == 200
    eventually(lambda: state_of(http, job["id"]) == "canceled", "canceled")


def test_a_request_can_be_repeated_safely(http: httpx.Client) -> None:
    """With an idempotency key a retry gets the first job instead of a second one."""
    first, again = (
        http.post("/v1/jobs", json={"prompt": "a lion"}, headers={"idempotency-key": "order-17"}) for _ in range(2)
    )
    assert first.json()["id"] == again.json()["id"]


def test_a_job_says_where_its_time_went(http: httpx.Client) -> None:
    """Timings per stage add up to the time from creation to the end."""
    created = http.post("/v1/jobs", json={"prompt": "a lion fake:step=0.02"}, headers={"prefer": "wait=30"}).json()
    assert list(created["timings"]) == [
        "queued", "load", "decode", "encode_text", "steps", "decode_image", "encode", "store", "finish",
    ]  # fmt: skip
    created_at, finished_at = (datetime.fromisoformat(created[name]) for name in ("created_at", "finished_at"))
    assert 0.02 * 20 <= sum(created["timings"].values()) <= (finished_at - created_at).total_seconds() + 0.005
    assert created["executed_by"].startswith("fake/")


def test_a_mistake_is_named(http: httpx.Client, grpc: Client) -> None:
    """The same field and code from every front end."""
    problem = http.post("/v1/jobs", json={"prompt": "a lion", "num_steps": 30}).json()
    assert (problem["status"], problem["code"], problem["field"]) == (400, "invalid_request", "num_steps")
    with pytest.raises(ClientError, match="'/num_steps' must be <= 20") as caught:
        grpc.create(prompt="a lion", num_steps=30)
    assert caught.value.code == "invalid_request"
