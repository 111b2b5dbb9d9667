"""The native API around jobs: event streams, cancels, accounts, and what operators read."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis

from tests.calls import bearer, blocked, jobs_of, problem, write_tenants
from tests.stack import Gateway, Stack, eventually, state_of, submit

ROUTES = [("GET", ""), ("GET", "/events"), ("GET", "/image"), ("POST", "/cancel"), ("POST", "/replay")]
ACCOUNTS = [f"account{number}" for number in range(50)]


@pytest.fixture(scope="module")
def stack(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    tenants = write_tenants(folder / "tenants.toml", "blocker", "stranger", *ACCOUNTS)
    with Stack(valkey_url, folder, tenants_file=tenants) as stack:
        stack.worker(concurrency="1", retry_delay="0.01", progress_interval="0")
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Gateway:
    return stack.gateway()


@pytest.fixture(scope="module")
def unused() -> Iterator[str]:
    return iter(ACCOUNTS)


@pytest.fixture
def client(gateway: Gateway, unused: Iterator[str]) -> Iterator[httpx.Client]:
    """A client of an account without any jobs."""
    with gateway.client(headers=bearer(next(unused))) as client:
        yield client


@pytest.fixture(scope="module")
def blocker(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client(headers=bearer("blocker")) as client:
        yield client


@pytest.fixture
def server(valkey_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey_url) as server:
        yield server


def events(
    client: httpx.Client, job_id: str, *, until: str = "", headers: dict[str, str] | None = None, query: str = ""
) -> list[dict[str, Any]]:
    """The stream's messages, up to its end or to the first event of type ``until``."""
    found: list[dict[str, Any]] = []
    with client.stream("GET", f"/v1/jobs/{job_id}/events{query}", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        message: dict[str, str] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                message[name] = value
                continue
            if "data" in message:
                found.append(json.loads(message["data"]))
                assert (message["id"], message["event"]) == (str(found[-1]["seq"]), found[-1]["type"])
                if until == message["event"]:
                    break
            message = {}
    return found


def bells(server: redis.Redis, job_id: str) -> list[Any]:
    """The channel on which a gateway hears of the job, if one does."""
    return list(server.pubsub_channels(f"*{job_id}*"))


def numbers(found: list[dict[str, Any]]) -> list[int]:
    return [event["seq"] for event in found]


# Events


def test_events_are_numbered_without_gaps(client: httpx.Client) -> None:
    """From the first to the terminal one, after which the stream ends."""
    # A step is told unless the one before is still on its way to the server.
    job = submit(client, prompt="fake:step=0.2", num_steps=5)
    found = events(client, job["id"])
    assert numbers(found) == list(range(1, len(found) + 1))
    kinds = [event["type"] for event in found]
    assert (kinds[:2], kinds[-1]) == (["queued", "running"], "succeeded")
    assert set(kinds[2:-1]) == {"progress"}
    steps = [event["step"] for event in found if event.get("stage") == "steps"]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    assert found[1]["attempt"] == 1


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_broken_stream_is_resumed_where_it_broke(client: httpx.Client, how: str) -> None:
    """``Last-Event-ID``, as a browser sends it, or ``after``: the rest follows, nothing twice and nothing missing."""
    job = submit(client, prompt="fake:step=0.05", num_steps=10)
    first = events(client, job["id"], until="running")
    seen = first[-1]["seq"]
    where: dict[str, Any] = (
        {"headers": {"last-event-id": str(seen)}} if how == "header" else {"query": f"?after={seen}"}
    )
    rest = events(client, job["id"], **where)
    assert numbers(first + rest) == list(range(1, seen + len(rest) + 1))
    assert rest[-1]["type"] == "succeeded"


def test_an_ended_jobs_events_can_be_read_again(client: httpx.Client) -> None:
    """The log is kept with the job; after its last event there is nothing, and the stream ends."""
    job = submit(client, prompt="x")
    whole = events(client, job["id"])
    assert events(client, job["id"]) == whole
    assert events(client, job["id"], headers={"last-event-id": str(whole[-1]["seq"])}) == []


def test_a_stream_from_beyond_the_end_ends_with_the_job(client: httpx.Client) -> None:
    """There is nothing to send, but the caller is not left hanging."""
    job = submit(client, prompt="fake:step=0.1", num_steps=5)
    assert events(client, job["id"], query="?after=1000") == []
    assert state_of(client, job["id"]) == "succeeded"


def test_a_failed_attempt_shows_in_the_events(client: httpx.Client) -> None:
    """A retry is a second ``queued`` with the reason, and its attempt has the next number."""
    job = submit(client, prompt="fake:fail=1", num_steps=1, seed=1)
    found = events(client, job["id"])
    marks = [(event["type"], event.get("attempt")) for event in found if event["type"] != "progress"]
    assert marks == [("queued", None), ("running", 1), ("queued", None), ("running", 2), ("succeeded", None)]
    reasons = [event["error"]["code"] for event in found if "error" in event]
    assert reasons == ["engine_failed"]


def test_a_stream_ends_with_its_jobs_record(client: httpx.Client, gateway: Gateway, server: redis.Redis) -> None:
    """The status is long sent: the stream just ends, and who connects again is told why."""
    job_id = submit(client, prompt="fake:step=60")["id"]
    with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "id: 1"
        [bell] = eventually(lambda: bells(server, job_id), "the stream follows the job")
        client.post(f"/v1/jobs/{job_id}/cancel")
        server.delete(*server.keys(f"*:events:{job_id}"), *server.keys(f"*}}:job:{job_id}"))
        server.publish(bell, "")
        for _ in lines:
            pass
    problem(client.get(f"/v1/jobs/{job_id}/events"), 404, "job_not_found")
    assert [entry for entry in gateway.entries() if entry.get("level") == "error"] == []


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nobody_waits_for_who_has_left(
    client: httpx.Client, gateway: Gateway, blocker: httpx.Client, server: redis.Redis, method: str
) -> None:
    """A long-poll whose caller hangs up is given up at once, and its bell taken down."""
    with blocked(blocker):
        before = jobs_of(client)
        if method == "GET":
            path = f"/v1/jobs/{submit(client, prompt='x')['id']}?wait=60"
            request, body = f"GET {path} HTTP/1.1", ""
        else:
            body = json.dumps({"prompt": "x"})
            request = f"POST /v1/jobs HTTP/1.1\r\nPrefer: wait=60\r\nContent-Length: {len(body)}"
        address = httpx.URL(gateway.http)
        with socket.create_connection((address.host, address.port or 80)) as caller:
            key = client.headers["authorization"]
            caller.sendall(f"{request}\r\nHost: x\r\nAuthorization: {key}\r\n\r\n{body}".encode())
            [job] = eventually(lambda: [job for job in jobs_of(client) if job not in before], "the job is there")
            eventually(lambda: bells(server, job["id"]), "the caller waits")
        eventually(lambda: not bells(server, job["id"]), "nobody waits any more", 5)


@pytest.mark.parametrize("value", ["x", "-1", "1.0", "²", str(2**63), "9" * 5000])
def test_an_event_id_is_a_number(client: httpx.Client, value: str) -> None:
    """What no event can have as its number is refused before the stream begins."""
    job = submit(client, prompt="x")
    answer = client.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": value.encode()})
    problem(answer, 400, "invalid_request", "last-event-id")


# Canceling


def test_a_queued_job_is_canceled_at_once(client: httpx.Client, blocker: httpx.Client) -> None:
    """It never starts."""
    with blocked(blocker):
        job = submit(client, prompt="x")
        answer = client.post(job["links"]["cancel"])
        assert (answer.status_code, answer.json()["state"]) == (200, "canceled")
    shown = client.get(job["links"]["self"]).json()
    assert (shown["attempt"], shown["error"]) == (0, {"code": "canceled", "message": "Canceled: user"})


def test_a_running_job_is_canceled_within_a_step(client: httpx.Client) -> None:
    """The answer says that it is still running; its end follows, and its picture never comes."""
    job = submit(client, prompt="fake:step=60")
    eventually(lambda: state_of(client, job["id"]) == "running", "the job has begun")
    assert client.post(job["links"]["cancel"]).status_code == 200
    assert client.get(job["links"]["self"], params={"wait": 60}).json()["state"] == "canceled"
    assert events(client, job["id"])[-1]["type"] == "canceled"
    problem(client.get(job["links"]["image"]), 409, "result_not_ready")


def test_an_ended_job_stays_as_it_is(client: httpx.Client) -> None:
    """Canceling what has ended changes nothing, however often."""
    job = submit(client, prompt="x")
    done = client.get(job["links"]["self"], params={"wait": 60}).json()
    for _ in range(2):
        answer = client.post(job["links"]["cancel"])
        assert (answer.status_code, answer.json()) == (200, done)
    assert client.get(job["links"]["image"]).status_code == 200


def test_canceling_twice_is_canceling_once(client: httpx.Client, blocker: httpx.Client) -> None:
    """A second cancel answers as the first did."""
    with blocked(blocker):
        job = submit(client, prompt="x")
        answers = [client.post(job["links"]["cancel"]).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert [event["type"] for event in events(client, job["id"])] == ["queued", "canceled"]


# Accounts


@pytest.mark.parametrize(("method", "route"), ROUTES)
@pytest.mark.parametrize("job", ["another's", "made up", "nonsense"])
def test_another_accounts_job_does_not_exist(
    client: httpx.Client, gateway: Gateway, method: str, route: str, job: str
) -> None:
    """Every route answers 404 in the same words, so that nobody can find out which ids are in use."""
    mine = submit(client, prompt="x")["id"]
    job_id = {"another's": mine, "made up": mine[:-1] + ("0" if mine[-1] != "0" else "1"), "nonsense": "x"}[job]
    with gateway.client(headers=bearer("stranger")) as stranger:
        answer = stranger.request(method, f"/v1/jobs/{job_id}{route}")
        detail = problem(answer, 404, "job_not_found")
        assert detail == f"No job '{job_id}' on this account: check the id, and that the key belongs to its account"
        assert jobs_of(stranger) == []
    done = client.get(f"/v1/jobs/{mine}", params={"wait": 60}).json()
    assert done["state"] == "succeeded"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_credentials"),
        ({"authorization": "Basic eDp5"}, "missing_credentials"),
        ({"authorization": "Bearer"}, "missing_credentials"),
        ({"authorization": "Bearer wrong"}, "unauthenticated"),
        ({"x-auth-key": "wrong"}, "unauthenticated"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs"),
        ("GET", "/v1/jobs/x"),
        ("GET", "/v1/jobs/x/events"),
        ("GET", "/v1/jobs/x/image"),
        ("POST", "/v1/jobs/x/cancel"),
        ("POST", "/v1/jobs/x/replay"),
        ("GET", "/v1/queue"),
    ],
)
def test_every_route_asks_for_a_key(
    gateway: Gateway, method: str, path: str, headers: dict[str, str], code: str
) -> None:
    """401 with the scheme to use, before anything else is looked at."""
    with gateway.client(headers=headers) as nobody:
        answer = nobody.request(method, path)
        problem(answer, 401, code)
        assert answer.headers["www-authenticate"].startswith("Bearer")


# Errors


def test_a_missing_route_points_to_the_schema(client: httpx.Client) -> None:
    """404 and 405 are problems like any other."""
    assert "/schema" in problem(client.get("/v1/nothing"), 404, "not_found")
    assert "/schema" in problem(client.get("/"), 404, "not_found")
    answer = client.delete("/v1/jobs")
    assert problem(answer, 405, "http") == "No DELETE on /v1/jobs: see /schema"
    assert set(answer.headers["allow"].split(", ")) >= {"GET", "POST"}


@pytest.mark.parametrize(
    ("request_", "status", "code", "field"),
    [
        ({"content": ""}, 400, "missing_body", None),
        ({"content": "{"}, 400, "malformed_body", None),
        ({"content": "{}"}, 400, "invalid_request", "prompt"),
        ({"json": {"prompt": "x", "width": 1}}, 400, "invalid_request", "width"),
        ({"json": {"prompt": "x", "image": [1]}}, 400, "invalid_image", "image"),
        ({"files": {"prompt": (None, "x"), "width": (None, "1")}}, 400, "invalid_request", "width"),
        ({"content": "x", "headers": {"content-type": "multipart/form-data"}}, 400, "malformed_body", None),
        (
            {"content": "x", "headers": {"content-type": "multipart/form-data; boundary=y"}},
            400,
            "malformed_body",
            None,
        ),
    ],
)
def test_a_wrong_body_is_a_problem(
    client: httpx.Client, request_: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    """RFC 9457 with our code, and the field where one is at fault; nothing is queued."""
    problem(client.post("/v1/jobs", **request_), status, code, field)
    assert jobs_of(client) == []


# Operation


def test_the_queue_shows_what_waits_and_who_works(client: httpx.Client, blocker: httpx.Client) -> None:
    """Counts of this moment, and each worker with its engine."""
    eventually(lambda: not any(client.get("/v1/queue").json()[name] for name in ("queued", "running")), "all is done")
    with blocked(blocker):
        submit(client, prompt="x")
        shown = client.get("/v1/queue").json()
        assert (shown["queued"], shown["delayed"], shown["running"]) == (1, 0, 1)
        (worker,) = shown["workers"]
        assert (worker["engine"], worker["slots"]) == ("fake", 1)
        metrics = client.get("/metrics")
        assert 'img2img_queue_jobs{queue="default",state="queued"} 1.0' in metrics.text


def test_metrics_are_openmetrics(client: httpx.Client) -> None:
    """What was submitted and refused is counted, without a key and without prompts."""
    submit(client, prompt="a secret lion")
    client.post("/v1/jobs", json={})
    accepts = {"accept": "application/openmetrics-text;version=1.0.0"}
    answer = httpx.get(f"{client.base_url}/metrics", headers=accepts, trust_env=False)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    assert "img2img_workers" in answer.text
    assert "invalid_request" in answer.text
    assert "secret" not in answer.text


def test_health_needs_no_key(gateway: Gateway) -> None:
    """Live means the process answers; ready means that jobs would be run."""
    with gateway.client() as nobody:
        assert nobody.get("/health/live").json() == {"status": "live"}
        ready = nobody.get("/health/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "workers": 1, "paused": 0})


def test_without_workers_the_service_is_not_ready(stack: Stack, unused: Iterator[str]) -> None:
    """It still answers, and still takes jobs, but says that nobody would run them."""
    gateway = stack.gateway(queue="unattended")
    with gateway.client(headers=bearer(next(unused))) as client:
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "no worker", "workers": 0})
        assert client.get("/health/live").status_code == 200
        job = submit(client, prompt="x")
        assert client.post(job["links"]["cancel"]).json()["state"] == "canceled"
