"""What every front end says of pools: why none takes a request, and where a job has gone."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from img2img.client import Client, MoveInfo
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import bearer, jobs_of, key_of, model_error, problem, run_path, write_tenants
from tests.stack import Gateway, Stack, eventually, submit
from tests.up.running import run

WAYS = ("native", "form", "cloudflare", "batch", "create", "generate")
DAY = 24 * 3600
FILE = """
[[pools]]
name = "away"
engine = "cloudflare"
max_steps = 5
step_price = 0.1
tenant_spend_per_day = 100

[[routes]]
pools = ["away"]

[[routes]]
pools = ["away"]
model = "cats"
"""
TWO_POOLS = """
[[pools]]
name = "first"
engine = "fake"
start_seconds = 0.2

[[pools]]
name = "second"
engine = "fake"

[[routes]]
pools = ["first", "second"]
"""


class Refusal(msgspec.Struct, frozen=True):
    """What a caller learns; ``number`` is Cloudflare's, None elsewhere, and ``wait`` is in seconds."""

    code: str
    status: int | grpc.StatusCode
    reason: str
    field: str | None = None
    wait: float | None = None
    number: int | None = None


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One pool, outside and for money, and nobody who works in it."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "pools.toml").write_text(FILE)
    tenants = Path(write_tenants(folder / "tenants.toml", "free", "home", "poor"))
    text = tenants.read_text().replace('"home"\n', '"home"\nresidency = "local"\n')
    tenants.write_text(text.replace('"poor"\n', '"poor"\nspend_per_day = 0.5\n'))
    with Stack(valkey_url, folder, tenants_file=str(tenants)) as stack:
        yield stack.gateway(pools_file=str(folder / "pools.toml"))


def refused(way: str, gateway: Gateway, account: str, options: dict[str, Any] | None = None, **fields: Any) -> Refusal:
    """Ask for a picture in the given way, and check the form of the refusal."""
    body = {"prompt": "x"} | fields
    if way in ("create", "generate"):
        return refused_by_grpc(way, gateway, account, options or {}, body)
    with gateway.client(headers=bearer(account)) as client:
        if way == "native":
            return of_native(client.post("/v1/jobs", json=body | {"options": options or {}}))
        if way == "form":
            parts = body | {f"options.{name}": value for name, value in (options or {}).items()}
            files = {name: (None, json.dumps(value).strip('"')) for name, value in parts.items()}
            return of_native(client.post("/v1/jobs", files=files))  # type: ignore[arg-type]
        if way == "batch":
            return of_cloudflare(client.post(f"{run_path(account)}?queueRequest=true", json={"requests": [body]}))
        return of_cloudflare(client.post(run_path(account), json=body))


def of_native(answer: httpx.Response) -> Refusal:
    body = answer.json()
    reason = problem(answer, answer.status_code, body["code"], body.get("field"))
    return Refusal(body["code"], answer.status_code, reason, body.get("field"), wait_of(answer))


def of_cloudflare(answer: httpx.Response) -> Refusal:
    code, number = answer.headers["img2img-error"], answer.json()["errors"][0]["code"]
    reason = model_error(answer, number, answer.status_code, code)
    return Refusal(code, answer.status_code, reason, wait=wait_of(answer), number=number)


def wait_of(answer: httpx.Response) -> float | None:
    return float(answer.headers["retry-after"]) if "retry-after" in answer.headers else None


def refused_by_grpc(way: str, gateway: Gateway, account: str, options: dict[str, Any], body: dict[str, Any]) -> Refusal:
    with grpc.insecure_channel(gateway.grpc) as channel:
        stub: Any = Img2ImgServiceStub(channel)
        method, kind = (stub.CreateJob, pb.CreateJobRequest) if way == "create" else (stub.Generate, pb.GenerateRequest)
        message = kind(request=pb.Img2ImgRequest(**body), options=pb.JobOptions(**options))
        with pytest.raises(grpc.RpcError) as caught:
            method(message, metadata=tuple(bearer(account).items()))
    error: Any = caught.value
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    wrong, quota = error_details_pb2.BadRequest(), error_details_pb2.QuotaFailure()
    for detail in rpc_status.from_call(error).details:
        assert any(detail.Unpack(kind) for kind in (info, retry, wrong, quota))
    field = wrong.field_violations[0].field if wrong.field_violations else None
    wait = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    assert (wait is None) == (not quota.violations)
    return Refusal(info.reason, error.code(), error.details(), field, wait)


@pytest.mark.parametrize("way", WAYS)
def test_what_no_pool_can_do_is_refused_with_its_field(gateway: Gateway, way: str) -> None:
    refusal = refused(way, gateway, "free", num_steps=6)
    assert refusal.code == "unsupported"
    assert (
        "'/num_steps': no pool of this service can do that: it takes at most 5 steps: ask for fewer" in refusal.reason
    )
    expected: dict[str, Any] = {
        "native": (400, "num_steps", None),
        "cloudflare": (400, None, 3030),
        "create": (grpc.StatusCode.INVALID_ARGUMENT, "num_steps", None),
    }
    kind = {"form": "native", "batch": "cloudflare", "generate": "create"}.get(way, way)
    assert (refusal.status, refusal.field, refusal.number) == expected[kind]
    assert ("request 0" in refusal.reason) == (way == "batch")


@pytest.mark.parametrize("way", ["native", "form", "create", "generate"])
@pytest.mark.parametrize("option", ["reproducible", "previews"])
def test_so_is_an_option(gateway: Gateway, way: str, option: str) -> None:
    refusal = refused(way, gateway, "free", {option: True}, num_steps=1)
    assert (refusal.code, refusal.field) == ("unsupported", f"options.{option}")
    assert "leave the option out" in refusal.reason


@pytest.mark.parametrize("way", WAYS)
def test_who_stays_here_is_sent_to_no_pool_outside(gateway: Gateway, way: str) -> None:
    refusal = refused(way, gateway, "home", num_steps=1)
    assert refusal.code == "residency"
    assert refusal.status == (grpc.StatusCode.PERMISSION_DENIED if way in ("create", "generate") else 403)
    assert refusal.number == (5018 if way in ("cloudflare", "batch") else None)
    assert refusal.wait is None


@pytest.mark.parametrize("way", ["native", "form", "create", "generate"])
def test_an_unknown_model_is_refused_with_those_that_there_are(gateway: Gateway, way: str) -> None:
    refusal = refused(way, gateway, "free", {"model": "dogs"}, num_steps=1)
    assert refusal.code == "model_not_found"
    assert refusal.status == (grpc.StatusCode.NOT_FOUND if way in ("create", "generate") else 404)
    assert "'dogs'" in refusal.reason
    assert "cats" in refusal.reason


def test_what_may_be_spent_is_refused_until_the_day_is_over(gateway: Gateway) -> None:
    """A first picture of five steps costs all that the account may spend; canceled, it costs nothing."""
    eventually(lambda: time.time() % DAY < DAY - 10, "a day that lasts for as long as the test")
    with gateway.client(headers=bearer("poor")) as client:
        job = submit(client, prompt="x", num_steps=5)
        assert job["pool"] == "away"
        for way in WAYS:
            refusal = refused(way, gateway, "poor", num_steps=1)
            assert refusal.code == "spend_cap_reached"
            assert refusal.status == (grpc.StatusCode.RESOURCE_EXHAUSTED if way in ("create", "generate") else 429)
            assert refusal.number == (3036 if way in ("cloudflare", "batch") else None)
            assert refusal.wait is not None
            assert 0 < refusal.wait <= DAY
            assert "00:00 UTC" in refusal.reason
        client.post(job["links"]["cancel"])
        client.post(submit(client, prompt="x", num_steps=5)["links"]["cancel"])
        assert {job["state"] for job in jobs_of(client, "poor")} == {"canceled"}


@pytest.mark.parametrize("account", ["home", "free"])
def test_what_was_refused_left_no_job(gateway: Gateway, account: str) -> None:
    with gateway.client(headers=bearer(account)) as client:
        assert jobs_of(client, account) == []


def test_a_move_is_told_by_every_front_end(valkey_url: str, tmp_path: Path) -> None:
    """The job waits for its first pool to get a worker, and then goes where there is one."""
    (tmp_path / "pools.toml").write_text(TWO_POOLS)
    with Stack(valkey_url, tmp_path, queue="second") as stack:
        gateway = stack.gateway(pools_file=str(tmp_path / "pools.toml"))
        stack.worker()
        with gateway.client() as client, Client(gateway.grpc, key=key_of("nobody")) as sdk:
            job = submit(client, prompt="x")
            assert job["pool"] == "first"
            events = list(sdk.watch(job["id"]))
            shown = client.get(f"/v1/jobs/{job['id']}").json()
            log = client.get(f"/v1/jobs/{job['id']}/events").text
            assert (shown["state"], shown["pool"], sdk.get(job["id"]).pool) == ("succeeded", "second", "second")
        lines = run("jobs", "watch", job["id"], IMG2IMG_SERVER=gateway.grpc).stdout.splitlines()
        row = run("jobs", "get", job["id"], IMG2IMG_SERVER=gateway.grpc).stdout
    assert [(event.type, event.pool, event.moved) for event in events][:2] == [
        ("queued", None, None),
        ("queued", "second", MoveInfo("first", "no_workers")),
    ]
    told = [json.loads(line.removeprefix("data: ")) for line in log.splitlines() if line.startswith("data: ")]
    assert told[1]["moved"] == {"from": "first", "why": "no_workers"}
    assert told[1]["pool"] == "second"
    assert "queued in second, no longer in first [no_workers]" in lines[1]
    assert "pool         second" in row
