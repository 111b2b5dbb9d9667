"""What every front end says when too much waits, and when a job will be done."""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import httpx
import msgspec
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import bearer, blocked, jobs_of, model_error, problem, run_path, write_tenants
from tests.parity_cases import ahead
from tests.stack import Gateway, Stack, submit
from tests.up.running import Terminal, run

REQUEST = pb.Img2ImgRequest(prompt="x")
WAYS = ("native", "cloudflare", "batch", "create", "generate")
SUBJECTS = {
    "queue_full": "queued jobs",
    "account_queue_full": "queued jobs of the account",
    "deadline_unreachable": "time until the deadline",
}


Start = Callable[..., tuple[Stack, Gateway]]


class Refusal(msgspec.Struct, frozen=True):
    """What a caller learns: when to try again, and the time to completion, both in seconds."""

    retry_after: float
    eta: float | None


def refused(way: str, gateway: Gateway, account: str | None, code: str) -> Refusal:
    """Ask for a picture in the given way, and check the form of the refusal."""
    name = account or "local"
    headers = bearer(name)
    if way in ("create", "generate"):
        return refused_by_grpc(way, gateway, headers, code)
    with gateway.client(headers=headers) as client:
        if way == "native":
            answer = client.post("/v1/jobs", json={"prompt": "x"})
            problem(answer, 429, code)
            return Refusal(int(answer.headers["retry-after"]), answer.json().get("eta_seconds"))
        body: dict[str, Any] = {"prompt": "x"}
        if way == "batch":
            answer = client.post(run_path(name) + "?queueRequest=true", json={"requests": [body, body]})
        else:
            answer = client.post(run_path(name), json=body)
    model_error(answer, 3040, 429, code)
    return Refusal(int(answer.headers["retry-after"]), None)


def refused_by_grpc(way: str, gateway: Gateway, headers: dict[str, str], code: str) -> Refusal:
    with grpc.insecure_channel(gateway.grpc) as channel:
        stub: Any = Img2ImgServiceStub(channel)
        method, kind = {
            "create": (stub.CreateJob, pb.CreateJobRequest),
            "generate": (stub.Generate, pb.GenerateRequest),
        }[way]
        with pytest.raises(grpc.RpcError) as caught:
            method(kind(request=REQUEST), metadata=tuple(headers.items()), timeout=None)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, retry, quota = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    for detail in rpc_status.from_call(error).details:
        assert any(detail.Unpack(kind) for kind in (info, retry, quota))
    assert info.reason == code
    assert [violation.subject for violation in quota.violations] == [SUBJECTS[code]]
    eta = info.metadata.get("eta_seconds")
    return Refusal(retry.retry_delay.ToMilliseconds() / 1000, None if eta is None else float(eta))


@pytest.fixture
def gateway_with(valkey_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts a gateway with the given settings on a queue of its own."""
    stacks = []

    def start(**settings: str) -> tuple[Stack, Gateway]:
        stacks.append(Stack(valkey_url, tmp_path, queue=uuid4().hex, **settings))
        return stacks[-1], stacks[-1].gateway()

    yield start
    for stack in stacks:
        stack.__exit__()


def test_a_full_queue(gateway_with: Start) -> None:
    """429 with the wait, in the words of each front end, until something has left the queue; nothing stays behind."""
    _, gateway = gateway_with(max_queued="1")
    with gateway.client() as client:
        job = submit(client, prompt="x")
        for way in WAYS:
            refusal = refused(way, gateway, None, "queue_full")
            assert refusal.retry_after >= 1
            assert refusal.eta is None  # nothing was measured yet
        assert client.get("/v1/queue").json()["queued"] == 1
        client.post(job["links"]["cancel"])
        client.post(submit(client, prompt="x")["links"]["cancel"])


def test_a_batch_that_does_not_fit(gateway_with: Start) -> None:
    """All of it or nothing; that is no trouble of which operators would have to be told."""
    _, gateway = gateway_with(max_queued="1")
    with gateway.client() as client:
        body = {"requests": [{"prompt": "x"}, {"prompt": "y"}]}
        answer = client.post(run_path(), params={"queueRequest": "true"}, json=body)
        assert (answer.status_code, answer.headers["img2img-error"]) == (429, "queue_full")
        assert client.get("/v1/queue").json()["queued"] == 0
    assert "job_not_taken_back" not in {entry["event"] for entry in gateway.entries()}


def test_a_full_account(gateway_with: Start, tmp_path: Path) -> None:
    """The tenants file bounds one account; others, and the setting for all who are not bounded there, are not hit."""
    tenants = Path(write_tenants(tmp_path / "tenants.toml", "small", "other"))
    tenants.write_text(tenants.read_text().replace('"small"\n', '"small"\nmax_queued = 1\nweight = 0.5\n'))
    _, gateway = gateway_with(tenants_file=str(tenants))
    with gateway.client(headers=bearer("small")) as small, gateway.client(headers=bearer("other")) as other:
        first = submit(small, prompt="x")
        for way in WAYS:
            assert refused(way, gateway, "small", "account_queue_full").retry_after >= 1
        made = [submit(other, prompt="x"), submit(other, prompt="x"), first]
        assert small.get("/v1/queue").json()["queued"] == 3
        for job, client in zip(made, (other, other, small), strict=True):
            client.post(job["links"]["cancel"])
        assert {job["state"] for job in jobs_of(small, "small")} == {"canceled"}


def measured(stack: Stack, client: httpx.Client) -> None:
    """A worker has run a job of half a second."""
    stack.worker(concurrency="1", fake_step_seconds="0.025")
    assert client.post("/v1/jobs", json={"prompt": "x"}, headers={"prefer": "wait=60"}).json()["state"] == "succeeded"


def test_times_to_completion_come_from_measurements(gateway_with: Start) -> None:
    """Once a job was measured, a refusal says when a job queued now would be done, and every live job when it will."""
    stack, gateway = gateway_with(max_queued="1")
    with gateway.client() as client:
        measured(stack, client)
        with blocked(client):
            waiting = submit(client, prompt="x")
            for way in ("native", "create", "generate"):
                eta = refused(way, gateway, None, "queue_full").eta
                assert eta is not None
                assert eta > 0.5, way
            said = run("generate", "x", IMG2IMG_SERVER=gateway.grpc)
            assert said.returncode == 1
            assert "a job queued now would be done in about" in said.stderr
            running = next(job for job in jobs_of(client) if job["state"] == "running")
            shown = client.get(waiting["links"]["self"]).json()
            for eta in (running["eta"], shown["eta"]):
                assert datetime.fromisoformat(eta["p50"]) <= datetime.fromisoformat(eta["p90"])
            assert shown["queue_position"] == 0
            with grpc.insecure_channel(gateway.grpc) as channel:
                stub: Any = Img2ImgServiceStub(channel)
                message = stub.GetJob(pb.GetJobRequest(id=waiting["id"])).job
            assert shown["created_at"] < shown["eta"]["p50"]
            assert message.create_time.ToMilliseconds() < message.eta.p50.ToMilliseconds()
            assert message.eta.p50.ToMilliseconds() <= message.eta.p90.ToMilliseconds()
            text = run("jobs", "get", waiting["id"], IMG2IMG_SERVER=gateway.grpc).stdout
            assert "done         in about " in text
            assert "queued, 0 ahead" in text
        done = client.get(waiting["links"]["self"], params={"wait": 60}).json()
        assert (done["state"], done["eta"], done["queue_position"]) == ("succeeded", None, None)


def test_a_deadline_that_cannot_be_met(gateway_with: Start) -> None:
    """A job that would end ``expired`` is refused, with the time that it would take."""
    stack, gateway = gateway_with()
    with gateway.client() as client:
        measured(stack, client)
    hasty = stack.gateway(max_job_age="0.1")
    for way in WAYS:
        refusal = refused(way, hasty, None, "deadline_unreachable")
        assert refusal.retry_after > 0
        assert (refusal.eta or 0) > 0.1 or way in ("cloudflare", "batch")


def test_a_late_job_is_taken_where_nobody_minds(gateway_with: Start) -> None:
    """``IMG2IMG_REFUSE_LATE=false`` leaves it to the deadline itself."""
    stack, gateway = gateway_with(refuse_late="false")
    with gateway.client() as client:
        measured(stack, client)
        job = submit(client, prompt="x", options={"deadline_seconds": 0.1})
        assert client.get(job["links"]["self"], params={"wait": 60}).json()["state"] == "expired"


def test_the_queue_shows_its_work(gateway_with: Start) -> None:
    """Counts, and the estimated seconds of what is ready to start; jobs for later are counted apart."""
    stack, gateway = gateway_with()
    with gateway.client() as client:
        measured(stack, client)
        with blocked(client):
            submit(client, prompt="x")
            submit(client, prompt="x", options={"not_before": ahead(days=7)})
            shown = client.get("/v1/queue").json()
    assert (shown["queued"], shown["delayed"], shown["running"], shown["quarantined"]) == (1, 1, 1, 0)
    assert shown["seconds"] > 0


def test_a_job_starts_no_sooner_than_asked(gateway_with: Start) -> None:
    """It waits apart from the queue, even beside an idle worker, and shows what it waits for."""
    stack, gateway = gateway_with()
    stack.worker()
    with gateway.client() as client:
        start = datetime.now().astimezone().timestamp() + 1.5
        later = datetime.fromtimestamp(start).astimezone().isoformat()
        job = submit(client, prompt="x", options={"not_before": later})
        assert (job["state"], job["queue_position"]) == ("queued", None)
        assert client.get("/v1/queue").json()["delayed"] == 1
        assert "not before " in run("jobs", "get", job["id"], IMG2IMG_SERVER=gateway.grpc).stdout
        done = client.get(job["links"]["self"], params={"wait": 60}).json()
    assert done["state"] == "succeeded"
    assert datetime.fromisoformat(done["started_at"]).timestamp() >= int(start * 1000) / 1000


def test_the_command_shows_what_it_waits_for(gateway_with: Start) -> None:
    """On a terminal, until the job begins or Ctrl-C cancels it."""
    _, gateway = gateway_with()
    with Terminal("generate", "x", "--not-before", ahead(hours=1), IMG2IMG_SERVER=gateway.grpc) as terminal:
        terminal.shows("queued, not before 2")
        terminal.press_ctrl_c()
        assert terminal.wait() == 130, terminal.text
    with gateway.client() as client:
        assert jobs_of(client)[0]["state"] == "canceled"


def test_the_command_can_wait_for_later(gateway_with: Start, tmp_path: Path) -> None:
    """``generate --not-before``; a time without an offset is this machine's."""
    stack, gateway = gateway_with()
    stack.worker()
    out = tmp_path / "x.png"
    ended = run(
        *("generate", "x", "-o", str(out), "--not-before", "2020-01-01T12:00", "--steps", "1"),
        IMG2IMG_SERVER=gateway.grpc,
    )
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(run("jobs", "list", "--limit", "1", "--json", IMG2IMG_SERVER=gateway.grpc).stdout)["options"][
        "not_before"
    ]
    assert datetime.fromisoformat(shown) == datetime(2020, 1, 1, 12).astimezone()
