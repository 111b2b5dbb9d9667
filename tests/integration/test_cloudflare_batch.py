"""Cloudflare's batch form: many requests in one submission, polled until all of them have ended."""

import base64
import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from tests.calls import (
    MODEL,
    PNG_MAGIC,
    bearer,
    blocked,
    edge_error,
    jobs_of,
    model_error,
    opened,
    picture,
    run_path,
    write_tenants,
)
from tests.stack import Gateway, Stack, eventually, state_of

ACCOUNTS = [f"account{number}" for number in range(30)]


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("stack")
    tenants = write_tenants(folder / "tenants.toml", "blocker", "stranger", *ACCOUNTS)
    with Stack(valkey_url, folder, tenants_file=tenants) as stack:
        gateway = stack.gateway()
        stack.worker(concurrency="1", retry_delay="0.01")
        yield gateway


@pytest.fixture(scope="module")
def unused() -> Iterator[str]:
    return iter(ACCOUNTS)


@pytest.fixture
def account(unused: Iterator[str]) -> str:
    """An account without any jobs."""
    return next(unused)


@pytest.fixture
def client(gateway: Gateway, account: str) -> Iterator[httpx.Client]:
    with gateway.client(headers=bearer(account)) as client:
        yield client


@pytest.fixture(scope="module")
def blocker(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client(headers=bearer("blocker")) as client:
        yield client


def submit_batch(client: httpx.Client, account: str, requests: object) -> httpx.Response:
    return client.post(run_path(account), params={"queueRequest": "true"}, json={"requests": requests})


def batch_id(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    request_id: str = answer.json()["result"]["request_id"]
    return request_id


def poll(client: httpx.Client, account: str, request_id: str, query: str = "") -> dict[str, Any]:
    answer = client.post(run_path(account) + query, json={"request_id": request_id})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["success"], body["errors"], body["messages"]) == (True, [], [])
    assert UUID(answer.headers["cf-ai-req-id"])
    result: dict[str, Any] = body["result"]
    return result


def responses(client: httpx.Client, account: str, request_id: str) -> list[dict[str, Any]]:
    """What the batch came to, as soon as all of it has ended."""
    found: list[dict[str, Any]] = eventually(
        lambda: poll(client, account, request_id).get("responses", []), "the batch is done"
    )
    return found


def test_a_batch_is_queued_at_once(client: httpx.Client, account: str) -> None:
    """The submission answers with an id to poll by, before anything has run."""
    answer = submit_batch(client, account, [{"prompt": "a"}, {"prompt": "b"}])
    result = answer.json()["result"]
    assert (result["status"], result["model"]) == ("queued", MODEL)
    assert UUID(result["request_id"])
    assert answer.json()["success"] is True
    assert len(jobs_of(client)) == 2


@pytest.mark.parametrize("query", ["", "?queueRequest=true"])
def test_a_poll_says_how_far_the_batch_is(
    client: httpx.Client, account: str, blocker: httpx.Client, query: str
) -> None:
    """Queued until one request has begun, running until all have ended; the query makes no difference."""
    with blocked(blocker):
        request_id = batch_id(submit_batch(client, account, [{"prompt": "x"}, {"prompt": "fake:step=60"}]))
        waiting = poll(client, account, request_id, query)
        assert waiting == {"status": "queued", "request_id": request_id, "model": MODEL}
    slow = next(job["id"] for job in jobs_of(client) if "step" in job["parameters"]["prompt"])
    eventually(lambda: state_of(client, slow) == "running", "the second request runs")
    assert poll(client, account, request_id, query)["status"] == "running"
    client.post(f"/v1/jobs/{slow}/cancel")
    assert [item["success"] for item in responses(client, account, request_id)] == [True, False]


def test_responses_come_in_the_order_of_the_requests(client: httpx.Client, account: str) -> None:
    """``id`` is the index in the submission, and each picture is base64 under ``image``."""
    requests = [{"prompt": "x", "seed": 1, "width": side, "height": 256} for side in (256, 264, 272)]
    items = responses(client, account, batch_id(submit_batch(client, account, requests)))
    assert [item["id"] for item in items] == [0, 1, 2]
    pictures = [base64.b64decode(item["result"]["image"], validate=True) for item in items]
    assert all(data.startswith(PNG_MAGIC) for data in pictures)
    assert [opened(data).size[0] for data in pictures] == [256, 264, 272]
    assert all(set(item) == {"id", "result", "success", "external_reference"} for item in items)


def test_a_finished_batch_comes_in_pieces(client: httpx.Client, account: str) -> None:
    """However many pictures it has, they are sent one by one, and make one JSON envelope."""
    request_id = batch_id(submit_batch(client, account, [{"prompt": "x"}] * 3))
    assert len(responses(client, account, request_id)) == 3
    with client.stream("POST", run_path(account), json={"request_id": request_id}) as answer:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["content-type"] == "application/json"
        body = json.loads(answer.read())
    assert list(body) == ["result", "success", "errors", "messages"]
    assert body["result"]["usage"] == {}


def test_a_batchs_jobs_are_counted_and_logged(gateway: Gateway, client: httpx.Client, account: str) -> None:
    """Operators see them as they see every other job."""

    def counted() -> float:
        lines = client.get("/metrics").text.splitlines()
        name = 'img2img_jobs_submitted_total{front_end="cloudflare-batch"}'
        return sum(float(line.split()[1]) for line in lines if line.startswith(name))

    before = counted()
    submit_batch(client, account, [{"prompt": "a"}, {"prompt": "b"}])
    assert counted() == before + 2
    logged = {entry["job"] for entry in gateway.entries() if entry.get("event") == "job_created"}
    assert {job["id"] for job in jobs_of(client)} <= logged


def test_references_come_back(client: httpx.Client, account: str) -> None:
    """``external_reference`` is the caller's own mark; without one it is null."""
    requests = [
        {"prompt": "x", "external_reference": "first"},
        {"prompt": "x"},
        {"prompt": "x", "external_reference": 7},
    ]
    items = responses(client, account, batch_id(submit_batch(client, account, requests)))
    assert [item["external_reference"] for item in items] == ["first", None, 7]


def test_a_batch_takes_pictures(client: httpx.Client, account: str) -> None:
    """Integers and base64 work inside a batch as they do outside."""
    data = picture(64, 32)
    requests = [
        {"prompt": "x", "seed": 1, "image": list(data)},
        {"prompt": "x", "seed": 1, "image_b64": base64.b64encode(data).decode()},
    ]
    items = responses(client, account, batch_id(submit_batch(client, account, requests)))
    assert items[0]["result"] == items[1]["result"]
    assert opened(base64.b64decode(items[0]["result"]["image"])).size == (512, 256)


def test_one_failure_leaves_the_others(client: httpx.Client, account: str) -> None:
    """A request that fails has Cloudflare's error in its place."""
    requests = [{"prompt": "x"}, {"prompt": "fake:refuse", "external_reference": "bad"}, {"prompt": "fake:fail"}]
    items = responses(client, account, batch_id(submit_batch(client, account, requests)))
    assert [item["success"] for item in items] == [True, False, False]
    assert (items[1]["result"], items[1]["external_reference"]) == (None, "bad")
    assert [item["errors"][0]["code"] for item in items[1:]] == [3030, 3043]
    assert items[1]["errors"][0]["message"].startswith("AiError: Model input is not valid: ")


BAD_REQUESTS: list[tuple[object, int, str, str]] = [
    ({"prompt": ""}, 5006, "invalid_request", "Length of '/prompt' must be >= 1 not met"),
    ({}, 5006, "invalid_request", "required properties at '/' are 'prompt'"),
    ("a dog", 5006, "invalid_request", "required properties at '/' are 'prompt'"),
    ({"prompt": "x", "image": [256]}, 5006, "invalid_request", "'/image/0' must be an integer between 0 and 255"),
    ({"prompt": "x", "image": [1, 2, 3]}, 3010, "invalid_image", "'/image' is not an image"),
    ({"prompt": "x", "image_b64": "!"}, 5006, "invalid_request", "'/image_b64' is not base64"),
]


@pytest.mark.parametrize(("bad", "code", "ours", "reason"), BAD_REQUESTS)
def test_one_bad_request_refuses_the_batch(
    client: httpx.Client, account: str, bad: object, code: int, ours: str, reason: str
) -> None:
    """Nothing is queued, and the message names the request by its index."""
    message = model_error(submit_batch(client, account, [{"prompt": "x"}, bad, {"prompt": ""}]), code, 400, ours)
    assert f"request 1: {reason}" in message
    assert jobs_of(client) == []


@pytest.mark.parametrize("requests", [[], {}, "x", None, {"a": {"prompt": "x"}}])
def test_requests_are_an_array(client: httpx.Client, account: str, requests: object) -> None:
    """A batch without requests is no batch."""
    message = model_error(submit_batch(client, account, requests), 5006, 400, "invalid_request")
    assert "'/requests' must be an array of at least one request" in message


def test_a_batch_has_at_most_a_hundred_requests(client: httpx.Client, account: str) -> None:
    """More are refused as a whole, with the remedy."""
    answer = submit_batch(client, account, [{"prompt": "x"}] * 101)
    assert "split it" in model_error(answer, 3006, 413, "request_too_large")
    assert jobs_of(client) == []


def test_a_batch_is_at_most_ten_megabytes(client: httpx.Client, account: str) -> None:
    """Cloudflare's bound holds for batches only: a single request may be larger."""
    answer = submit_batch(client, account, [{"prompt": "x", "image_b64": "A" * 10 * 1024 * 1024}])
    assert "at most 10485760 bytes" in model_error(answer, 3006, 413, "request_too_large")


def test_an_unknown_batch_is_7003(client: httpx.Client, account: str) -> None:
    """A made-up id, and the id of another account's batch, are alike."""
    request_id = batch_id(submit_batch(client, account, [{"prompt": "x"}]))
    for unknown in (str(uuid4()), "", "x" * 1000, request_id + "0"):
        answer = client.post(run_path(account), json={"request_id": unknown})
        model_error(answer, 7003, 404, "job_not_found")
    answer = client.post(run_path("stranger"), json={"request_id": request_id}, headers=bearer("stranger"))
    model_error(answer, 7003, 404, "job_not_found")
    answer = client.post(run_path("stranger"), json={"request_id": request_id})
    edge_error(answer, 10000, 401, "account_mismatch")
    assert poll(client, account, request_id)


def test_a_prompt_is_never_a_poll(client: httpx.Client, account: str) -> None:
    """A request may carry a ``request_id`` of its own; with a prompt it is a request."""
    answer = client.post(run_path(account), json={"prompt": "x", "request_id": "mine"})
    assert answer.content.startswith(PNG_MAGIC)
