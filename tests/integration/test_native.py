"""The native jobs API: creating, waiting, listing, canceling and reading jobs, and its errors."""

import base64
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.calls import bearer, blocked, jobs_of, opened, picture, problem, write_tenants
from tests.stack import DOG, Gateway, Stack, eventually, state_of, submit

ACCOUNTS = [f"account{number}" for number in range(80)]
JOB_ID = re.compile(r"0-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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


def finished(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """A job at its end."""
    answer = client.post("/v1/jobs", json={"prompt": "x"} | body, headers={"prefer": "wait=60"})
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


# Creating


def test_a_job_is_accepted_and_located(client: httpx.Client) -> None:
    """202 with the job and where to find it; the picture comes later."""
    answer = client.post("/v1/jobs", json={"prompt": "a lion", "seed": 2**64 - 1})
    job = answer.json()
    assert answer.status_code == 202
    assert JOB_ID.fullmatch(job["id"])
    assert answer.headers["location"] == job["links"]["self"] == f"/v1/jobs/{job['id']}"
    assert answer.headers["img2img-job-id"] == job["id"]
    assert (job["state"] in ("queued", "running"), job["seed"]) == (True, 2**64 - 1)
    done = client.get(job["links"]["self"], params={"wait": 60}).json()
    assert (done["state"], done["attempt"], done["error"]) == ("succeeded", 1, None)
    assert done["executed_by"].startswith("fake/fake on ")


def test_a_finished_job_tells_where_its_time_went(client: httpx.Client) -> None:
    """The stages' seconds add up to the job's whole life, to within the clocks' milliseconds."""
    job = finished(client, num_steps=3)
    created, started, done = (datetime.fromisoformat(job[f"{name}_at"]) for name in ("created", "started", "finished"))
    assert created <= started <= done
    assert sum(job["timings"].values()) == pytest.approx((done - created).total_seconds(), abs=0.1)
    assert set(job["timings"]) >= {"queued", "load", "steps", "encode", "store"}


def test_a_form_with_files_is_the_same_job(client: httpx.Client) -> None:
    """Multipart carries pictures as files and numbers as text; the result is the JSON body's, byte for byte."""
    data, mask = DOG.read_bytes(), picture(32, 32)
    fields = {"prompt": "a lion", "num_steps": 5, "strength": 0.5, "guidance": 2.5, "seed": 9, "negative_prompt": "3"}
    options = {"output_format": "webp", "priority": 1}
    as_json = finished(client, image=list(data), mask=list(mask), options=options, **fields)
    form = {name: str(value) for name, value in fields.items()} | {
        "options.output_format": "webp",
        "options.priority": "1",
    }
    files = {"image": ("dog.png", data, "image/png"), "mask": ("mask.png", mask)}
    answer = client.post("/v1/jobs", data=form, files=files, headers={"prefer": "wait=60"})
    as_form = answer.json()
    assert answer.status_code == 200, answer.text
    assert as_form["parameters"] == as_json["parameters"]
    assert as_form["options"] == as_json["options"] == options
    assert as_form["result"]["sha256"] == as_json["result"]["sha256"]


def test_a_form_takes_options_as_json(client: httpx.Client) -> None:
    """One part named ``options`` is a JSON object; parts named ``options.<name>`` win over it."""
    form = {"prompt": "x", "options": '{"priority": 2, "output_quality": 50}', "options.priority": "3"}
    files = {name: (None, value) for name, value in form.items()}
    job = client.post("/v1/jobs", files=files).json()
    assert job["options"] == {"priority": 3, "output_quality": 50}


def test_a_caller_may_prefer_to_wait(client: httpx.Client, blocker: httpx.Client) -> None:
    """``Prefer: wait=N`` answers 200 with the ended job, or 202 with the job as it is after N seconds."""
    answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"prefer": "respond-async, wait=60"})
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=60"
    with blocked(blocker):
        answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"prefer": "wait=0.1"})
        assert (answer.status_code, answer.json()["state"]) == (202, "queued")
        assert client.get(f"/v1/jobs/{answer.json()['id']}", params={"wait": 0.1}).json()["state"] == "queued"


def test_waiting_is_bounded(client: httpx.Client) -> None:
    """The service says how long it will really wait at most."""
    for not_asked in ('foo="a, wait=9"', "wait", "wait=soon", "nowait=9", 'wait="9"'):
        answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"prefer": not_asked})
        assert "preference-applied" not in answer.headers
    answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"prefer": "Wait=100000; strict"})
    assert answer.headers["preference-applied"] == "wait=60"


@pytest.mark.parametrize("spelling", ["seconds", "time", "option"])
def test_a_deadline_ends_the_job(client: httpx.Client, blocker: httpx.Client, spelling: str) -> None:
    """Given as seconds, as a time, or as an option, it is when the job must be done, queued or not."""
    with blocked(blocker):
        later = (datetime.now(UTC) + timedelta(seconds=0.5)).isoformat()
        given: dict[str, dict[str, Any]] = {
            "seconds": {"json": {"prompt": "x"}, "headers": {"deadline": "0.5"}},
            "time": {"json": {"prompt": "x"}, "headers": {"deadline": later}},
            "option": {"json": {"prompt": "x", "options": {"deadline_seconds": 0.5}}},
        }
        job = client.post("/v1/jobs", **given[spelling]).json()
        life = datetime.fromisoformat(job["expires_at"]) - datetime.fromisoformat(job["created_at"])
        assert life <= timedelta(seconds=0.5)
        done = client.get(f"/v1/jobs/{job['id']}", params={"wait": 30}).json()
    assert (done["state"], done["error"]["code"]) == ("expired", "expired")
    problem(client.get(f"/v1/jobs/{job['id']}/image"), 409, "result_not_ready")


def test_a_running_job_meets_its_deadline_too(client: httpx.Client) -> None:
    """The worker stops within a step."""
    eventually(lambda: client.get("/v1/queue").json()["running"] == 0, "the worker is free")
    job = finished(client, prompt="fake:step=30", options={"deadline_seconds": 0.5})
    assert (job["state"], job["attempt"]) == ("expired", 1)


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", "2020-01-31T12:00:00Z"])
def test_a_deadline_lies_in_the_future(client: httpx.Client, value: str) -> None:
    """Anything else is refused by name."""
    answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"deadline": value})
    assert "'Deadline' must" in problem(answer, 400, "invalid_request", "deadline")
    assert jobs_of(client) == []


def test_a_deadline_of_nobodys_clock_is_refused(client: httpx.Client) -> None:
    """A time without an offset would be that of the gateway's machine, which no caller knows."""
    for later in (datetime.now() + timedelta(hours=1), datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=1)):
        answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"deadline": later.isoformat()})
        assert "'Deadline' must" in problem(answer, 400, "invalid_request", "deadline")


def test_an_idempotency_key_replays_the_first_answer(
    client: httpx.Client, gateway: Gateway, unused: Iterator[str]
) -> None:
    """The same key and body is the same job, while it runs and after its end; keys belong to their account."""
    key = {"idempotency-key": "k"}
    first = client.post("/v1/jobs", json={"prompt": "x"}, headers=key).json()
    client.get(f"/v1/jobs/{first['id']}", params={"wait": 60})
    again = client.post("/v1/jobs", json={"prompt": "x"}, headers=key)
    assert (again.status_code, again.json()["id"], again.json()["state"]) == (200, first["id"], "succeeded")
    assert len(jobs_of(client)) == 1
    with gateway.client(headers=bearer(next(unused))) as other:
        assert other.post("/v1/jobs", json={"prompt": "x"}, headers=key).json()["id"] != first["id"]


@pytest.mark.parametrize("change", [{"prompt": "y"}, {"seed": 5}, {"options": {"priority": 1}}, {"image_b64": "dog"}])
def test_an_idempotency_key_is_for_one_body(client: httpx.Client, change: dict[str, Any]) -> None:
    """Whatever changes the result is another request: 409 with the remedy."""
    key = {"idempotency-key": "k"}
    if "image_b64" in change:
        change = {"image_b64": base64.b64encode(picture()).decode()}
    assert client.post("/v1/jobs", json={"prompt": "x"}, headers=key).status_code == 202
    answer = client.post("/v1/jobs", json={"prompt": "x"} | change, headers=key)
    assert "send a new key" in problem(answer, 409, "idempotency_conflict")
    assert len(jobs_of(client)) == 1


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_an_idempotency_key_has_a_length(client: httpx.Client, key: str) -> None:
    """1 to 255 characters."""
    answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"idempotency-key": key})
    problem(answer, 400, "invalid_request", "idempotency_key")


def test_a_misspelt_option_is_refused_and_a_misspelt_field_is_noted(client: httpx.Client) -> None:
    """Options are ours, so an unknown one is an error; fields are Cloudflare's, which ignores what it does not know."""
    answer = client.post("/v1/jobs", json={"prompt": "x", "options": {"priorty": 1}})
    assert "priorty" in problem(answer, 400, "invalid_request", "options")
    job = finished(client, num_step=3)
    assert (job["parameters"]["num_steps"], job["warnings"]) == (20, ["unknown field 'num_step' was ignored"])


def test_cloudflares_option_is_legal(client: httpx.Client, blocker: httpx.Client) -> None:
    """A body that Cloudflare takes is taken here, too: ``rejectIfBusy`` is ``reject_if_busy``."""
    with blocked(blocker):
        for options in ({"rejectIfBusy": True}, {"reject_if_busy": True}):
            answer = client.post("/v1/jobs", json={"prompt": "x", "options": options})
            problem(answer, 429, "no_capacity")
            assert int(answer.headers["retry-after"]) >= 1
    assert jobs_of(client) == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"priority": 11}, "options.priority"),
        ({"priority": "1"}, "options.priority"),
        ({"output_quality": 0}, "options.output_quality"),
        ({"output_format": "gif"}, "options.output_format"),
        ({"sampler": "magic"}, "options.sampler"),
        ({"deadline_seconds": 0}, "options.deadline_seconds"),
        ({"deadline_seconds": 1e9}, "options.deadline_seconds"),
        ({"reject_if_busy": 1}, "options.reject_if_busy"),
        ({"not_before": 1e9}, "options.not_before"),
        ({"not_before": "9999-12-31T23:59:59-14:00"}, "options.not_before"),
        ([], "options"),
        ("fast", "options"),
    ],
)
def test_a_wrong_option_is_named(client: httpx.Client, options: object, field: str) -> None:
    """``field`` is where the problem lies."""
    problem(client.post("/v1/jobs", json={"prompt": "x", "options": options}), 400, "invalid_request", field)


# Reading


@pytest.mark.parametrize(("form", "pillow"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_a_picture_comes_in_the_format_asked_for(client: httpx.Client, form: str, pillow: str) -> None:
    """With its media type, for its caller only, and with the digest that the job shows."""
    job = finished(client, width=264, height=256, options={"output_format": form})
    answer = client.get(job["links"]["image"])
    assert answer.headers["content-type"] == job["result"]["media_type"] == f"image/{form}"
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["img2img-job-id"] == job["id"]
    image = opened(answer.content)
    assert (image.format, image.size) == (pillow, (264, 256))
    assert len(answer.content) == job["result"]["bytes"]


def test_quality_is_the_callers(client: httpx.Client) -> None:
    """A lower ``output_quality`` makes a smaller file of the same picture."""
    sizes = [
        finished(client, seed=1, options={"output_format": "jpeg", "output_quality": quality})["result"]["bytes"]
        for quality in (10, 95)
    ]
    assert sizes[0] < sizes[1]


def test_a_picture_is_there_once_the_job_has_succeeded(client: httpx.Client, blocker: httpx.Client) -> None:
    """409 before, and after an end without one; the message says what to do."""
    with blocked(blocker):
        job = submit(client, prompt="x")
        assert "wait for it" in problem(client.get(job["links"]["image"]), 409, "result_not_ready")
    failed = finished(client, prompt="fake:refuse")
    assert (failed["state"], failed["error"]["code"]) == ("failed", "model_refused")
    assert "told to refuse" in problem(client.get(failed["links"]["image"]), 409, "result_not_ready")


def test_a_picture_is_gone_after_its_retention(stack: Stack, account: str) -> None:
    """410 with the remedy; the job itself can still be read."""
    gateway = stack.gateway(queue="fleeting")
    stack.worker(queue="fleeting", result_retention="0.05")
    with gateway.client(headers=bearer(account)) as client:
        job = finished(client)
        eventually(lambda: client.get(job["links"]["image"]).status_code == 410, "the retention is over")
        assert "send the request again" in problem(client.get(job["links"]["image"]), 410, "result_gone")
        assert state_of(client, job["id"]) == "succeeded"


def test_a_long_poll_answers_at_the_jobs_end(client: httpx.Client) -> None:
    """``wait`` ends early with the job, and at once when it has ended before."""
    job = submit(client, prompt="fake:step=0.02")
    for _ in range(2):
        assert client.get(job["links"]["self"], params={"wait": 60}).json()["state"] == "succeeded"


def test_a_queued_job_knows_its_place(client: httpx.Client, blocker: httpx.Client) -> None:
    """``queue_position`` counts the jobs ahead; a higher priority goes first."""
    with blocked(blocker):
        first, second = submit(client, prompt="x"), submit(client, prompt="x")
        urgent = submit(client, prompt="x", options={"priority": 10})
        places = [client.get(job["links"]["self"]).json()["queue_position"] for job in (urgent, first, second)]
        assert places == [0, 1, 2]
    assert finished(client)["queue_position"] is None


def test_a_running_job_shows_its_steps(client: httpx.Client) -> None:
    """Which of how many, and the size of the picture to be; nothing of it is left when it has ended."""
    job = submit(client, prompt="fake:step=0.3", num_steps=20)
    shown = eventually(lambda: _running(client, job["id"]), "a step is done")
    assert (shown["steps"], shown["width"], shown["height"]) == (20, 256, 256)
    assert 0 < shown["step"] <= 20
    client.post(job["links"]["cancel"])


def _running(client: httpx.Client, job_id: str) -> dict[str, Any] | None:
    job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}").json()
    return job if job["step"] else None


def test_jobs_are_listed_in_pages(client: httpx.Client) -> None:
    """Newest first; ``next`` leads through all pages without a job twice or left out."""
    made = [submit(client, prompt="x")["id"] for _ in range(5)]
    pages, cursor = [], None
    while not pages or cursor is not None:
        query = {"limit": 2} if cursor is None else {"limit": 2, "cursor": cursor}
        body = client.get("/v1/jobs", params=query).json()
        pages.append([job["id"] for job in body["jobs"]])
        cursor = body["next"]
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [job_id for page in pages for job_id in page] == made[::-1]


def test_a_cursor_that_is_no_longer_listed_ends_the_list(client: httpx.Client, blocker: httpx.Client) -> None:
    """A list that began again at its first page would never end."""
    submit(client, prompt="x")
    other = submit(blocker, prompt="x")["id"]
    assert client.get("/v1/jobs", params={"cursor": other}).json() == {"jobs": [], "next": None}


def test_a_list_can_be_of_one_state(client: httpx.Client) -> None:
    """The filter holds across pages."""
    refused = [finished(client, prompt="fake:refuse")["id"] for _ in range(3)]
    fine = finished(client)["id"]
    first = client.get("/v1/jobs", params={"state": "failed", "limit": 2}).json()
    second = client.get("/v1/jobs", params={"state": "failed", "limit": 2, "cursor": first["next"]}).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == refused[::-1]
    assert [job["id"] for job in client.get("/v1/jobs", params={"state": "succeeded"}).json()["jobs"]] == [fine]


@pytest.mark.parametrize(
    ("query", "field", "remedy"),
    [
        ({"limit": 0}, "limit", "see /schema"),
        ({"limit": 101}, "limit", "see /schema"),
        ({"state": "done"}, "state", "see /schema"),
        ({"cursor": "x"}, "cursor", "must be the 'next' of an earlier page"),
    ],
)
def test_a_wrong_query_is_named(client: httpx.Client, query: dict[str, Any], field: str, remedy: str) -> None:
    """Bounds and names are those of /schema."""
    message = problem(client.get("/v1/jobs", params=query), 400, "invalid_request", field)
    assert f"'{field}'" in message
    assert remedy in message
