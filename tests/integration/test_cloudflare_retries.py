"""Calls that time out or hang up: the SDK sends them again, and the work must neither be lost nor done twice.

One worker with one slot, held by a blocker, keeps every other job queued for as long as a test needs.
"""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest
import redis

from tests.calls import bearer, blocked, is_picture, jobs_of, model_error, run_path, write_tenants
from tests.stack import Gateway, Stack, eventually, state_of

ACCOUNTS = [f"account{number}" for number in range(40)]
RETRY = {"x-stainless-retry-count": "1"}
Post = Callable[..., httpx.Response]


class Service(msgspec.Struct):
    """Three gateways on one queue: one waits, one soon answers 408, one also soon gives up the job."""

    patient: Gateway
    impatient: Gateway
    hasty: Gateway
    stack: Stack
    blocker: httpx.Client
    unused: Iterator[str]


@pytest.fixture(scope="module")
def service(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("stack")
    tenants = write_tenants(folder / "tenants.toml", "blocker", *ACCOUNTS)
    with Stack(valkey_url, folder, tenants_file=tenants) as stack:
        stack.worker(concurrency="1", retry_delay="0.01")
        impatient = stack.gateway(sync_timeout="0.2", retry_grace="60")
        hasty = stack.gateway(sync_timeout="0.2", retry_grace="0.1")
        patient = stack.gateway()
        with patient.client(headers=bearer("blocker")) as blocker:
            yield Service(patient, impatient, hasty, stack, blocker, iter(ACCOUNTS))


@pytest.fixture
def account(service: Service) -> str:
    """An account without any jobs."""
    return next(service.unused)


@pytest.fixture
def client(service: Service, account: str) -> Iterator[httpx.Client]:
    """A client of the account at the gateway that waits."""
    with service.patient.client(headers=bearer(account)) as client:
        yield client


def run(gateway: Gateway, account: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    spelt = {name.replace("_", "-"): value for name, value in headers.items()}
    with gateway.client(headers=bearer(account)) as client:
        return client.post(run_path(account), json=body, headers=spelt)


def time_out(service: Service, account: str, body: dict[str, Any], **headers: str) -> str:
    """A call that is answered 408 while its job stays queued; answers with the job's id."""
    answer = run(service.impatient, account, body, **headers)
    assert "send the same request again" in model_error(answer, 3007, 408, "wait_timeout")
    assert answer.headers.get("x-should-retry") != "false"
    with service.patient.client() as client:
        return jobs_of(client, account)[0]["id"]


def test_a_retry_joins_the_job_of_the_call_that_timed_out(service: Service, account: str, client: httpx.Client) -> None:
    """408 is an answer in time, not the end: the same body with a retry count gets the first job's picture."""
    body = {"prompt": "x"}
    with blocked(service.blocker):
        job = time_out(service, account, body)
    answer = client.post(run_path(account), json=body, headers=RETRY)
    assert is_picture(answer)
    assert answer.headers["img2img-job-id"] == job
    assert len(jobs_of(client)) == 1


def test_a_second_retry_joins_as_well(service: Service, account: str, client: httpx.Client) -> None:
    """An SDK tries three times; each waits for the one job."""
    with blocked(service.blocker):
        jobs = {
            time_out(service, account, {"prompt": "x"}),
            time_out(service, account, {"prompt": "x"}, x_stainless_retry_count="1"),
        }
    answer = client.post(run_path(account), json={"prompt": "x"}, headers={"x-stainless-retry-count": "2"})
    assert is_picture(answer)
    assert jobs == {answer.headers["img2img-job-id"]}


def test_a_retry_joins_the_job_of_a_client_that_hung_up(service: Service, account: str, client: httpx.Client) -> None:
    """A client that gives up first closes its connection; its job waits for the retry."""
    body = msgspec.json.encode({"prompt": "x"})
    with blocked(service.blocker):
        hang_up(service.patient, account, body, lambda: len(jobs_of(client)) == 1)
    answer = client.post(run_path(account), content=body, headers=RETRY)
    assert is_picture(answer)
    assert [job["id"] for job in jobs_of(client)] == [answer.headers["img2img-job-id"]]


def hang_up(gateway: Gateway, account: str, body: bytes, when: Callable[[], bool]) -> None:
    """Send a whole request, and close the connection without its answer as soon as ``when`` holds."""
    host, _, port = gateway.http.removeprefix("http://").partition(":")
    head = f"POST {run_path(account)} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: {bearer(account)['authorization']}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        eventually(when, "the request has arrived")


def test_two_callers_wait_for_one_job(service: Service, account: str, client: httpx.Client) -> None:
    """A retry that overtakes the call it repeats: both get the picture of the one job."""
    with ThreadPoolExecutor() as pool:
        with blocked(service.blocker):
            first = pool.submit(run, service.patient, account, {"prompt": "x"})
            eventually(lambda: len(jobs_of(client)) == 1, "the first call has its job")
            second = pool.submit(run, service.patient, account, {"prompt": "x"}, x_stainless_retry_count="1")
        answers = [first.result(), second.result()]
    assert all(is_picture(answer) for answer in answers)
    assert answers[0].content == answers[1].content
    assert len(jobs_of(client)) == 1


def test_a_retry_of_a_finished_call_gets_its_picture(account: str, client: httpx.Client) -> None:
    """The answer was lost on its way: the picture is there already."""
    first = client.post(run_path(account), json={"prompt": "x"})
    again = client.post(run_path(account), json={"prompt": "x"}, headers=RETRY)
    assert is_picture(again)
    assert again.headers["img2img-job-id"] == first.headers["img2img-job-id"]
    assert again.content == first.content


@pytest.mark.parametrize("count", [None, "0", "", "-1", "abc"])
def test_what_is_no_retry_is_a_new_job(service: Service, account: str, client: httpx.Client, count: str | None) -> None:
    """Two calls with the same body are two pictures, unless the second says that it is a retry."""
    with blocked(service.blocker):
        job = time_out(service, account, {"prompt": "x"})
    headers = {} if count is None else {"x-stainless-retry-count": count}
    answer = client.post(run_path(account), json={"prompt": "x"}, headers=headers)
    assert is_picture(answer)
    assert answer.headers["img2img-job-id"] != job
    assert len(jobs_of(client)) == 2


@pytest.mark.parametrize("change", [{"prompt": "y"}, {"seed": 1}, {"options": {"rejectIfBusy": True}}])
def test_another_body_does_not_join(
    service: Service, account: str, client: httpx.Client, change: dict[str, Any]
) -> None:
    """A retry repeats its body to the letter; anything else is another wish."""
    with blocked(service.blocker):
        job = time_out(service, account, {"prompt": "x"})
    with service.patient.client(headers=bearer(account)) as idle:
        eventually(lambda: state_of(idle, job) == "succeeded", "the first job is done")
    answer = client.post(run_path(account), json={"prompt": "x"} | change, headers=RETRY)
    assert is_picture(answer)
    assert answer.headers["img2img-job-id"] != job


def test_another_account_does_not_join(service: Service, account: str, client: httpx.Client) -> None:
    """Jobs are never shared between accounts, whatever their bodies."""
    with blocked(service.blocker):
        time_out(service, account, {"prompt": "x"})
    stranger = next(service.unused)
    answer = run(service.patient, stranger, {"prompt": "x"}, x_stainless_retry_count="1")
    assert is_picture(answer)
    assert [job["id"] for job in jobs_of(client, stranger)] == [answer.headers["img2img-job-id"]]
    assert len(jobs_of(client)) == 1


def test_the_same_idempotency_key_joins(service: Service, account: str, client: httpx.Client) -> None:
    """A key does without a retry count, and finds the job after its end, too."""
    body, key = {"prompt": "x"}, {"idempotency-key": "order 66"}
    with blocked(service.blocker):
        job = time_out(service, account, body, idempotency_key="order 66")
    answers = [client.post(run_path(account), json=body, headers=key) for _ in range(2)]
    assert all(is_picture(answer) for answer in answers)
    assert {answer.headers["img2img-job-id"] for answer in answers} == {job}
    assert len(jobs_of(client)) == 1


def test_a_used_idempotency_key_refuses_another_body(account: str, client: httpx.Client) -> None:
    """One key is one request; repeating the call would not help, so the SDK is told not to."""
    key = {"idempotency-key": "one"}
    assert is_picture(client.post(run_path(account), json={"prompt": "x"}, headers=key))
    answer = client.post(run_path(account), json={"prompt": "y"}, headers=key)
    model_error(answer, 3010, 409, "idempotency_conflict")
    assert answer.headers["x-should-retry"] == "false"
    assert len(jobs_of(client)) == 1


@pytest.mark.parametrize("start", ["queued", "running"])
def test_a_job_that_nobody_waits_for_is_canceled(
    service: Service, account: str, client: httpx.Client, start: str
) -> None:
    """After the grace period without a retry the work would be for nobody, whether it had begun or not."""
    if start == "queued":
        with blocked(service.blocker):
            job = _abandon(service, account)
            eventually(lambda: state_of(client, job) == "canceled", "the queued job ends")
    else:
        job = _abandon(service, account)
        eventually(lambda: state_of(client, job) == "canceled", "the running job ends")
    shown = client.get(f"/v1/jobs/{job}").json()
    assert shown["error"] == {"code": "canceled", "message": "Canceled: disconnect"}


def _abandon(service: Service, account: str) -> str:
    answer = run(service.hasty, account, {"prompt": "fake:step=60"})
    model_error(answer, 3007, 408, "wait_timeout")
    with service.patient.client() as client:
        return jobs_of(client, account)[0]["id"]


def test_a_job_whose_client_hung_up_is_canceled(service: Service, account: str, client: httpx.Client) -> None:
    """A closed connection starts the grace period as a 408 does."""
    body = msgspec.json.encode({"prompt": "fake:step=60"})
    hang_up(service.hasty, account, body, lambda: len(jobs_of(client)) == 1)
    job = jobs_of(client)[0]["id"]
    eventually(lambda: state_of(client, job) == "canceled", "nobody waits")


def test_a_retry_after_the_grace_period_starts_anew(service: Service, account: str, client: httpx.Client) -> None:
    """The canceled job is no answer to somebody who waits after all."""
    with blocked(service.blocker):
        answer = run(service.hasty, account, {"prompt": "x"})
        model_error(answer, 3007, 408, "wait_timeout")
        job = jobs_of(client)[0]["id"]
        eventually(lambda: state_of(client, job) == "canceled", "the grace period is over")
    answer = client.post(run_path(account), json={"prompt": "x"}, headers=RETRY)
    assert is_picture(answer)
    assert answer.headers["img2img-job-id"] != job


def test_a_retry_does_not_join_a_job_that_is_being_canceled(
    service: Service, account: str, client: httpx.Client, valkey_url: str
) -> None:
    """Between the end of the grace period and the worker's next look up, the job still runs, but for nobody."""
    body = msgspec.json.encode({"prompt": "fake:block=2", "num_steps": 1})
    gateway = service.stack.gateway(retry_grace="0.1")
    hang_up(gateway, account, body, lambda: [job["state"] for job in jobs_of(client)] == ["running"])
    job = jobs_of(client)[0]["id"]
    with redis.Redis.from_url(valkey_url) as server:
        eventually(lambda: server.hget(f"img2img:{{0}}:job:{job}", "stop"), "the job is told to stop")
    assert state_of(client, job) == "running"
    answer = client.post(run_path(account), content=body, headers=RETRY)
    assert is_picture(answer)
    assert answer.headers["img2img-job-id"] != job


def test_a_failed_job_is_not_joined(account: str, client: httpx.Client) -> None:
    """A retry asks for another try, not for the same failure again."""
    body = {"prompt": "fake:refuse"}
    model_error(client.post(run_path(account), json=body), 3030, 400, "model_refused")
    model_error(client.post(run_path(account), json=body, headers=RETRY), 3030, 400, "model_refused")
    assert len(jobs_of(client)) == 2


def test_a_caller_is_told_when_its_job_is_canceled(service: Service, account: str, client: httpx.Client) -> None:
    """A cancel by the owner ends the call with 3008, which an SDK must not repeat."""
    with ThreadPoolExecutor() as pool:
        call = pool.submit(run, service.patient, account, {"prompt": "fake:step=60"})
        eventually(lambda: [job["state"] for job in jobs_of(client)] == ["running"], "the job runs")
        client.post(f"/v1/jobs/{jobs_of(client)[0]['id']}/cancel")
        answer = call.result()
    assert "Canceled: user" in model_error(answer, 3008, 408, "canceled")
    assert answer.headers["x-should-retry"] == "false"


def test_a_job_beyond_its_longest_life_expires(service: Service, account: str) -> None:
    """3007 again, but final: the job is over, so a repetition would start from the beginning."""
    gateway = service.stack.gateway(max_job_age="0.2")
    answer = run(gateway, account, {"prompt": "fake:step=60"})
    model_error(answer, 3007, 408, "expired")
    assert answer.headers["x-should-retry"] == "false"
