"""A safety checker in a worker: what it flags is an error of its own on every front end, and nobody sees it."""

from collections.abc import Iterator

import httpx
import pytest

from img2img.client import Client, ClientError
from tests.calls import is_picture, model_error, problem, run_path
from tests.stack import Gateway, Stack, eventually, submit

FLAGGED = "The safety checker flagged the picture: change the prompt, the input picture or the seed"


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        gateway = stack.gateway()
        stack.worker(safety_checker="fake", retry_delay="0.01")
        yield gateway


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def test_a_harmless_picture_passes(http: httpx.Client) -> None:
    """The time that the look took is a stage of its own."""
    job = http.post("/v1/jobs", json={"prompt": "a lion"}, headers={"prefer": "wait=60"}).json()

    assert job["state"] == "succeeded"
    stages = list(job["timings"])
    assert stages[stages.index("decode_image") :] == ["decode_image", "check", "encode", "store", "finish"]


def test_a_flagged_picture_fails_its_job_at_once(http: httpx.Client) -> None:
    """One attempt, no result, and no picture of any kind."""
    job = submit(http, prompt="a lion fake:unsafe")
    ended = http.get(f"/v1/jobs/{job['id']}", params={"wait": 60}).json()

    assert (ended["state"], ended["attempt"], ended["result"]) == ("failed", 1, None)
    assert ended["error"] == {"code": "unsafe_output", "message": FLAGGED}
    assert FLAGGED in problem(http.get(job["links"]["image"]), 409, "result_not_ready")


def test_cloudflare_is_told_3030(http: httpx.Client) -> None:
    """As Cloudflare answers for flagged output, with a status that SDKs do not repeat."""
    answer = http.post(run_path(), json={"prompt": "fake:unsafe"})

    assert model_error(answer, 3030, 400, "unsafe_output") == f"Output has been flagged: {FLAGGED}"
    assert is_picture(http.post(run_path(), json={"prompt": "a lion"}))


def test_a_batch_is_told_3030_for_that_request_only(http: httpx.Client) -> None:
    body = {"requests": [{"prompt": "a lion"}, {"prompt": "fake:unsafe"}]}
    batch = http.post(f"{run_path()}?queueRequest=true", json=body).json()["result"]

    def done() -> list[dict[str, object]] | None:
        found: list[dict[str, object]] | None = (
            http.post(run_path(), json={"request_id": batch["request_id"]}).json()["result"].get("responses")
        )
        return found

    good, bad = eventually(done, "the batch to end")

    assert (good["success"], bad["success"], bad["result"]) == (True, False, None)
    assert [error["code"] for error in bad["errors"]] == [3030]  # type: ignore[attr-defined]


def test_grpc_is_told_the_same_code(gateway: Gateway) -> None:
    with Client(gateway.grpc) as client, pytest.raises(ClientError) as caught:
        client.generate(prompt="fake:unsafe")

    assert (caught.value.code, caught.value.message) == ("unsafe_output", FLAGGED)


def test_without_a_checker_nothing_is_flagged(stack: Stack) -> None:
    gateway = stack.gateway(queue="unchecked")
    stack.worker(queue="unchecked")
    with gateway.client() as http:
        assert is_picture(http.post(run_path(), json={"prompt": "fake:unsafe"}))
