"""Cloudflare's official Python SDKs, as they come from PyPI, in processes of their own against our gateway.

``make setup`` installs both versions beside the environment; 5.x encodes the model's name, 4.x does not.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.calls import MODEL, PNG_MAGIC, bearer, blocked, jobs_of, key_of, opened, write_tenants
from tests.stack import DOG, Gateway, Stack, submit

SDKS = Path(sys.prefix) / "sdk"
VERSIONS = ("5.9.0", "4.3.1")
CASES = ("plain", "picture", "errors", "busy", "full", "timeout", "answered408", "keymode")

# Reads calls as JSON, makes them with the SDK, and writes what came of each.
DRIVER = """
import base64, json, sys
import cloudflare

def call(spec):
    client = cloudflare.Cloudflare(**spec.get("client", {}))
    fields = dict(spec["fields"])
    if "image" in fields:
        fields["image"] = list(base64.b64decode(fields["image"]))
    try:
        answer = client.ai.with_raw_response.run(spec["model"], account_id=spec["account"], **fields)
    except cloudflare.APIStatusError as error:
        return {
            "error": type(error).__name__,
            "status": error.status_code,
            "codes": [entry.code for entry in error.errors],
            "body": error.response.json(),
        }
    return {"data": base64.b64encode(answer.read()).decode(), "headers": dict(answer.headers)}

json.dump([call(spec) for spec in json.load(sys.stdin)], sys.stdout)
"""

CATALOG = """
import json, sys
import cloudflare

client = cloudflare.Cloudflare()
account, model = sys.argv[1:]
json.dump({
    "version": cloudflare.__version__,
    "models": [item["name"] for item in client.ai.models.list(account_id=account, author="runwayml")],
    "none": [item["name"] for item in client.ai.models.list(account_id=account, search="llama")],
    "schema": client.ai.models.schema.get(account_id=account, model=model),
    "tasks": [item["name"] for item in client.ai.tasks.list(account_id=account)],
}, sys.stdout, default=lambda value: value.model_dump())
"""


@pytest.fixture(scope="module")
def stack(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    accounts = [account_for(case, version) for case in CASES for version in VERSIONS]
    tenants = write_tenants(folder / "tenants.toml", "blocker", *accounts)
    with Stack(valkey_url, folder, tenants_file=tenants) as stack:
        stack.worker(concurrency="1", retry_delay="0.01")
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Gateway:
    return stack.gateway()


@pytest.fixture(scope="module")
def impatient(stack: Stack) -> Gateway:
    """Answers 408 long before a job of a second is done."""
    return stack.gateway(sync_timeout="0.2")


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def account_for(case: str, version: str) -> str:
    return f"{case}-{version.replace('.', '-')}"


def python(gateway: Gateway, version: str, token: str, *command: str, given: str = "") -> Any:
    """The JSON that a script prints which sees nothing but the SDK and its own environment variables."""
    folder = SDKS / f"cloudflare-{version}"
    assert folder.is_dir(), f"{folder} is missing: run `make setup`"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CLOUDFLARE", "IMG2IMG"))}
    environment |= {"PYTHONPATH": str(folder), "NO_PROXY": "*", "CLOUDFLARE_BASE_URL": f"{gateway.http}/client/v4"}
    if token:
        environment["CLOUDFLARE_API_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", *command], env=environment, input=given, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_all(gateway: Gateway, version: str, account: str, *calls: dict[str, Any], token: str | None = None) -> Any:
    specs = [{"model": MODEL, "account": account, "fields": {"prompt": "x"}} | call for call in calls]
    token = key_of(account) if token is None else token
    return python(gateway, version, token, DRIVER, given=json.dumps(specs))


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def test_a_prompt_and_a_picture_become_a_picture(gateway: Gateway, version: str) -> None:
    """``with_raw_response.run(…).read()`` gives PNG bytes, with and without an image as a list of integers."""
    image = base64.b64encode(DOG.read_bytes()).decode()
    lion = {"prompt": "Change to a lion", "image": image, "strength": 0.6, "num_steps": 4, "seed": 3}
    answers = run_all(gateway, version, account_for("picture", version), {}, {"fields": lion}, {"fields": lion})
    pictures = [base64.b64decode(answer["data"]) for answer in answers]
    assert all(data.startswith(PNG_MAGIC) for data in pictures)
    assert opened(pictures[0]).size == (256, 256)
    assert pictures[0] != pictures[1] == pictures[2]
    assert all(answer["headers"]["content-type"] == "image/png" for answer in answers)


def test_errors_are_the_sdks_own_classes(gateway: Gateway, client: httpx.Client, version: str) -> None:
    """Each refusal arrives as the class that the SDK has for it, with Cloudflare's number, and at once."""
    account = account_for("errors", version)
    answers = run_all(
        gateway,
        version,
        account,
        {"fields": {"prompt": "x", "num_steps": 21}},
        {"fields": {"prompt": "x", "image": base64.b64encode(b"no picture").decode()}},
        {"model": "@cf/meta/llama-3"},
        {"model": "llama"},
        {"account": "somebody"},
        {"client": {"api_token": "wrong"}},
        {"fields": {"prompt": "fake:refuse"}},
    )
    assert [(answer["error"], answer["status"], answer["codes"]) for answer in answers] == [
        ("BadRequestError", 400, [5006]),
        ("BadRequestError", 400, [3010]),
        ("BadRequestError", 400, [5007]),
        ("NotFoundError", 404, [3042]),
        ("AuthenticationError", 401, [10000]),
        ("AuthenticationError", 401, [10000]),
        ("BadRequestError", 400, [3030]),
    ]
    assert "'/num_steps' must be <= 20" in answers[0]["body"]["errors"][0]["message"]
    assert [job["state"] for job in jobs_of(client, account)] == ["failed"]


def test_a_failed_job_is_not_sent_again(gateway: Gateway, client: httpx.Client, version: str) -> None:
    """A 500 is repeated by the SDK unless it is told that this would not help."""
    account = account_for("plain", version)
    (answer,) = run_all(gateway, version, account, {"fields": {"prompt": "fake:fail"}})
    assert (answer["error"], answer["codes"]) == ("InternalServerError", [3043])
    assert len(jobs_of(client, account)) == 1


def test_a_busy_service_is_a_rate_limit(gateway: Gateway, client: httpx.Client, version: str) -> None:
    """``rejectIfBusy`` while every worker is busy: RateLimitError, and nothing is queued."""
    account = account_for("busy", version)
    fields = {"prompt": "x", "extra_body": {"options": {"rejectIfBusy": True}}}
    with gateway.client(headers=bearer("blocker")) as blocker, blocked(blocker):
        (answer,) = run_all(gateway, version, account, {"client": {"max_retries": 0}, "fields": fields})
    assert (answer["error"], answer["status"], answer["codes"]) == ("RateLimitError", 429, [3040])
    assert jobs_of(client, account) == []


def test_a_full_queue_is_a_rate_limit(stack: Stack, version: str) -> None:
    """The SDK's own retries wait for as long as they are told; the last answer is RateLimitError."""
    account = account_for("full", version)
    gateway = stack.gateway(queue=f"full-{version}", max_queued="1")
    with gateway.client(headers=bearer("blocker")) as client:
        job = submit(client, prompt="x")
        (answer,) = run_all(gateway, version, account, {"client": {"max_retries": 1}})
        assert (answer["error"], answer["status"], answer["codes"]) == ("RateLimitError", 429, [3040])
        client.post(job["links"]["cancel"])
        assert jobs_of(client, account) == []


def test_the_sdks_retry_after_its_timeout_joins_the_job(gateway: Gateway, client: httpx.Client, version: str) -> None:
    """A client timeout sends the POST again; the job is run once, and its picture arrives."""
    account = account_for("timeout", version)
    call = {"client": {"timeout": 0.8, "max_retries": 20}, "fields": {"prompt": "fake:step=0.1", "num_steps": 12}}
    (answer,) = run_all(gateway, version, account, call)
    assert base64.b64decode(answer["data"]).startswith(PNG_MAGIC)
    assert [job["id"] for job in jobs_of(client, account)] == [answer["headers"]["img2img-job-id"]]


def test_the_sdks_retry_after_408_joins_the_job(impatient: Gateway, client: httpx.Client, version: str) -> None:
    """An answer in time, 408, makes the SDK come back for the job by itself."""
    account = account_for("answered408", version)
    call = {"client": {"max_retries": 20}, "fields": {"prompt": "fake:step=0.05", "num_steps": 12}}
    (answer,) = run_all(impatient, version, account, call)
    assert base64.b64decode(answer["data"]).startswith(PNG_MAGIC)
    assert [job["id"] for job in jobs_of(client, account)] == [answer["headers"]["img2img-job-id"]]


def test_the_key_mode_works(gateway: Gateway, version: str) -> None:
    """An API key with an e-mail address, the older way of signing in."""
    account = account_for("keymode", version)
    keys = {"api_key": key_of(account), "api_email": "somebody@example.com"}
    (answer,) = run_all(gateway, version, account, {"client": keys}, token="")
    assert base64.b64decode(answer["data"]).startswith(PNG_MAGIC)


def test_the_catalog_can_be_read(gateway: Gateway, version: str) -> None:
    """The SDK's lists of models and tasks, and the schema of ours."""
    account = account_for("plain", version)
    found = python(gateway, version, key_of(account), CATALOG, account, MODEL)
    assert (found["version"], found["models"], found["none"]) == (version, [MODEL], [])
    assert found["tasks"] == ["Text-to-Image"]
    assert found["schema"]["input"]["required"] == ["prompt"]
