"""Models that the pools file has routes for: asked for in every front end's way, and the same job in each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import httpx
import pytest

from img2img.client import Client, JobOptions
from img2img.schema import INPUT_SCHEMA
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import MODEL, is_picture, model_error, run_path
from tests.parity_cases import write_pools
from tests.stack import Gateway, Stack, eventually
from tests.up.running import run

CATS = "@cf/acme/cats"
MODELS = (CATS, "sd-1.5", "1.5", "stabilityai/sd-turbo")


@pytest.fixture(scope="module")
def stack(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    file = write_pools(tmp_path_factory.mktemp("pools") / "pools.toml", *MODELS)
    gateway = stack.gateway(pools_file=file)
    stack.worker(concurrency="4")
    return gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def ai(path: str) -> str:
    return f"/client/v4/accounts/local/ai/{path}"


def options_of(client: httpx.Client, job_id: str) -> dict[str, Any]:
    return client.get(f"/v1/jobs/{job_id}").json()["options"]


@pytest.mark.parametrize("model", MODELS)
def test_every_front_end_asks_for_the_same_model(client: httpx.Client, gateway: Gateway, model: str) -> None:
    """One idempotency key for all of them: a request that differed in anything would be a conflict."""
    key = {"idempotency-key": uuid4().hex}
    json_job = client.post("/v1/jobs", json={"prompt": "x", "options": {"model": model}}, headers=key).json()
    parts = {"prompt": (None, "x"), "options.model": (None, model)}
    form_job = client.post("/v1/jobs", files=parts, headers=key).json()  # type: ignore[arg-type]
    run_answer = client.post(run_path(model=model), json={"prompt": "x"}, headers=key)
    with grpc.insecure_channel(gateway.grpc) as channel:
        asked = pb.CreateJobRequest(
            request=pb.Img2ImgRequest(prompt="x"), options=pb.JobOptions(model=model), idempotency_key=key.popitem()[1]
        )
        grpc_job = Img2ImgServiceStub(channel).CreateJob(asked).job
    assert is_picture(run_answer)
    ids = {json_job["id"], form_job["id"], run_answer.headers["img2img-job-id"], grpc_job.id}
    assert len(ids) == 1, (json_job, form_job, run_answer.headers, grpc_job)
    assert json_job["options"] == {"model": model}
    assert grpc_job.options.model == model


@pytest.mark.parametrize("model", [CATS, CATS.replace("/", "%2F"), f"{CATS}/", "stabilityai%2Fsd-turbo"])
def test_a_model_of_the_routes_may_be_spelt_with_a_slash_or_encoded(client: httpx.Client, model: str) -> None:
    """As Cloudflare's own may; its name need not have the form of Cloudflare's."""
    answer = client.post(run_path(model=model), json={"prompt": "x"})
    assert is_picture(answer)
    shown = options_of(client, answer.headers["img2img-job-id"])
    assert shown == {"model": model.replace("%2F", "/").rstrip("/")}


def test_cloudflares_own_model_is_the_services_choice(client: httpx.Client) -> None:
    """The path names a model, the job none: what runs there is for the routes to say."""
    answer = client.post(run_path(), json={"prompt": "x", "options": {"model": CATS}})
    assert is_picture(answer)
    assert options_of(client, answer.headers["img2img-job-id"]) == {}


def test_a_route_may_take_cloudflares_own_model_by_name(stack: Stack, tmp_path: Path) -> None:
    """It is listed once all the same."""
    gateway = stack.gateway(pools_file=write_pools(tmp_path / "pools.toml", MODEL))
    with gateway.client() as client:
        answer = client.post(run_path(), json={"prompt": "x"})
        assert is_picture(answer)
        assert options_of(client, answer.headers["img2img-job-id"]) == {"model": MODEL}
        assert [card["name"] for card in client.get(ai("models/search")).json()["result"]] == [MODEL]


def test_a_model_and_reject_if_busy_go_together(client: httpx.Client) -> None:
    answer = client.post(run_path(model=CATS), json={"prompt": "x", "options": {"rejectIfBusy": True}})
    assert is_picture(answer)
    shown = options_of(client, answer.headers["img2img-job-id"])
    assert shown == {"reject_if_busy": True, "model": CATS}


def test_a_batch_is_of_the_model_in_its_path(client: httpx.Client) -> None:
    """Every job of it, and what is said of it before its end."""
    asked = {"requests": [{"prompt": "fake:step=60"}, {"prompt": "x"}]}
    queued = client.post(run_path(model=CATS) + "?queueRequest=true", json=asked).json()["result"]
    jobs = client.get("/v1/jobs", params={"limit": 2}).json()["jobs"]
    polled = client.post(run_path(), json={"request_id": queued["request_id"]}).json()["result"]
    assert queued["model"] == polled["model"] == CATS
    assert [job["options"] for job in jobs] == [{"model": CATS}] * 2
    for job in jobs:
        client.post(job["links"]["cancel"])


def test_other_models_are_not_there(client: httpx.Client) -> None:
    """In Cloudflare's words, as ever."""
    unknown = client.post(run_path(model="@cf/acme/dogs"), json={"prompt": "x"})
    assert model_error(unknown, 5007, 400, "model_not_found") == "No such model @cf/acme/dogs or task"
    model_error(client.post(run_path(model="dogs"), json={"prompt": "x"}), 3042, 404, "model_name_invalid")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, [MODEL, *MODELS]),
        ({"author": "acme"}, [CATS]),
        ({"author": "runwayml"}, [MODEL]),
        ({"author": "StabilityAI"}, ["stabilityai/sd-turbo"]),
        ({"search": "cats"}, [CATS]),
        ({"search": "1.5"}, ["sd-1.5", "1.5"]),
        ({"hide_experimental": "true"}, list(MODELS)),
        ({"task": "Translation"}, []),
        ({"page": "2", "per_page": "2"}, ["sd-1.5", "1.5"]),
    ],
)
def test_models_are_found_by_every_filter(client: httpx.Client, query: dict[str, str], found: list[str]) -> None:
    """Cloudflare's first, as a beta; then those of the routes in the file's order."""
    assert [card["name"] for card in client.get(ai("models/search"), params=query).json()["result"]] == found


def test_a_models_id_stays_the_same(client: httpx.Client, stack: Stack, tmp_path: Path) -> None:
    """It is made from the name: other gateways and other files say the same."""
    other = stack.gateway(pools_file=write_pools(tmp_path / "pools.toml", "another", CATS))
    with other.client() as second:
        cards = [one.get(ai("models/search"), params={"search": "cats"}).json()["result"] for one in (client, second)]
    assert cards[0] == cards[1]
    ids = [card["id"] for card in client.get(ai("models/search")).json()["result"]]
    assert len(set(ids)) == len(MODELS) + 1


def test_a_models_schema_is_the_published_one(client: httpx.Client) -> None:
    assert client.get(ai("models/schema"), params={"model": CATS}).json()["result"]["input"] == INPUT_SCHEMA
    unknown = client.get(ai("models/schema"), params={"model": "@cf/acme/dogs"})
    model_error(unknown, 5007, 400, "model_not_found")


def test_the_command_and_the_client_ask_for_a_model(client: httpx.Client, gateway: Gateway, tmp_path: Path) -> None:
    """And read it back."""
    ended = run("generate", "x", "--model", CATS, "-o", str(tmp_path / "x.png"), IMG2IMG_SERVER=gateway.grpc)
    assert ended.returncode == 0, ended.stderr
    listed = run("jobs", "list", "--limit", "1", "--json", IMG2IMG_SERVER=gateway.grpc)
    assert json.loads(listed.stdout)["options"]["model"] == CATS
    with Client(gateway.grpc) as sdk:
        job = sdk.create(prompt="x", options=JobOptions(model="1.5"))
        assert sdk.get(job.id).options.model == "1.5"
        eventually(lambda: sdk.get(job.id).state.is_terminal, "its end")
