"""Cloudflare's table of errors: each row that can be provoked, with its number, status, words and headers."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.calls import (
    MODEL,
    bearer,
    edge_error,
    is_picture,
    jobs_of,
    key_of,
    model_error,
    picture,
    run_path,
    write_tenants,
)
from tests.stack import Gateway, Stack, eventually, state_of, submit

LIMIT = 200_000


@pytest.fixture(scope="module")
def stack(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with Stack(valkey_url, folder, tenants_file=write_tenants(folder / "tenants.toml", "acme", "umbrella")) as stack:
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Gateway:
    gateway = stack.gateway(max_json_body=str(LIMIT), max_body_bytes_in_flight="1000000")
    stack.worker(concurrency="4", retry_delay="0.01")
    return gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client(headers=bearer("acme")) as client:
        yield client


REQUIRED = "required properties at '/' are 'prompt'"
WORDINGS: list[tuple[str, str]] = [
    ("{}", REQUIRED),
    ("null", REQUIRED),
    ("[]", REQUIRED),
    ("7", REQUIRED),
    ('"x"', REQUIRED),
    ('{"Prompt": "x"}', REQUIRED),
    ('{"prompt": ""}', "Length of '/prompt' must be >= 1 not met"),
    ('{"prompt": 1}', "Type mismatch of '/prompt', 'string' not in 'number','integer'"),
    ('{"prompt": 1.5}', "Type mismatch of '/prompt', 'string' not in 'number'"),
    ('{"prompt": true}', "Type mismatch of '/prompt', 'string' not in 'boolean'"),
    ('{"prompt": {}}', "Type mismatch of '/prompt', 'string' not in 'object'"),
    ('{"prompt": null}', "Type mismatch of '/prompt', 'string' not in 'null'"),
    ('{"prompt": "x", "num_steps": 21}', "'/num_steps' must be <= 20"),
    ('{"prompt": "x", "num_steps": 2.5}', "Type mismatch of '/num_steps', 'integer' not in 'number'"),
    ('{"prompt": "x", "num_steps": "2"}', "Type mismatch of '/num_steps', 'integer' not in 'string'"),
    ('{"prompt": "x", "width": 100}', "'/width' must be >= 256"),
    ('{"prompt": "x", "width": 2049}', "'/width' must be <= 2048"),
    ('{"prompt": "x", "height": 255}', "'/height' must be >= 256"),
    ('{"prompt": "x", "image": "abc"}', "Type mismatch of '/image', 'array' not in 'string'"),
    ('{"prompt": "x", "mask": 1}', "Type mismatch of '/mask', 'array' not in 'number','integer'"),
    ('{"prompt": "x", "image_b64": [1]}', "Type mismatch of '/image_b64', 'string' not in 'array','binary'"),
    ('{"prompt": "x", "guidance": null}', "Type mismatch of '/guidance', 'number' not in 'null'"),
    ('{"num_steps": 30, "width": 1}', "'/width' must be >= 256"),
    ('{"num_steps": 30, "prompt": ""}', "Length of '/prompt' must be >= 1 not met"),
]


@pytest.mark.parametrize(("body", "reason"), WORDINGS)
def test_a_field_against_the_schema_is_5006(client: httpx.Client, body: str, reason: str) -> None:
    """The first error only, in the schema's order and in Cloudflare's validator's words."""
    assert (
        model_error(client.post(run_path("acme"), content=body), 5006, 400, "invalid_request")
        == f"Bad input: Error: {reason}"
    )


OUR_RULES: list[tuple[dict[str, Any], str]] = [
    ({"num_steps": 0}, "'/num_steps' must be >= 1"),
    ({"num_steps": -3}, "'/num_steps' must be >= 1"),
    ({"strength": 2}, "'/strength' must be between 0 and 1"),
    ({"strength": -1}, "'/strength' must be between 0 and 1"),
    ({"guidance": 51}, "'/guidance' must be between 0 and 50"),
    ({"seed": -1}, "'/seed' must be between 0 and 18446744073709551615"),
    ({"seed": 2**64}, "'/seed' must be between 0 and 18446744073709551615"),
    ({"image": [256, -1]}, "'/image/0' must be an integer between 0 and 255"),
    ({"image": [1, -1]}, "'/image/1' must be an integer between 0 and 255"),
    ({"image": ["a"]}, "'/image/0' must be an integer between 0 and 255"),
    ({"image": [1.5]}, "'/image/0' must be an integer between 0 and 255"),
    ({"image_b64": "!!"}, "'/image_b64' is not base64"),
    ({"image": list(picture()), "image_b64": "AAAA"}, "'/image' and '/image_b64' are both given: send one of them"),
    ({"mask": list(picture())}, "'/mask' needs '/image' or '/image_b64'"),
    ({"image": list(picture()), "num_steps": 1, "strength": 0.5}, "must be at least one step"),
    ({"prompt": "x" * 16_385}, "Length of '/prompt' must be <= 16384 bytes"),
]


@pytest.mark.parametrize(("fields", "reason"), OUR_RULES)
def test_what_the_schema_lets_through_is_5006_too(client: httpx.Client, fields: dict[str, Any], reason: str) -> None:
    """Values that make no sense are refused with the remedy, although Cloudflare's schema takes them."""
    answer = client.post(run_path("acme"), json={"prompt": "x"} | fields)
    assert reason in model_error(answer, 5006, 400, "invalid_request")


def test_a_size_that_is_no_multiple_of_eight_is_rounded(client: httpx.Client) -> None:
    """513 is legal at Cloudflare and so it is here; the job says what became of it."""
    answer = client.post(run_path("acme"), json={"prompt": "x", "width": 513, "height": 256})
    assert is_picture(answer)
    job = client.get(f"/v1/jobs/{answer.headers['img2img-job-id']}").json()
    assert (job["width"], job["warnings"]) == (512, ["width 513 was rounded to 512, a multiple of 8"])


def test_no_body_is_3003(client: httpx.Client) -> None:
    """An empty body is missing, not wrong."""
    for body in ("", " \n"):
        reason = model_error(client.post(run_path("acme"), content=body), 3003, 400, "missing_body")
        assert reason == "Request is missing headers or body: body"


@pytest.mark.parametrize("body", ["{", "prompt=x", '{"prompt": "x"}}', '{"prompt": NaN}', '{"prompt": "\xff"}'])
def test_a_body_that_is_no_json_is_3010(client: httpx.Client, body: str) -> None:
    """Neither field nor schema is at fault; the message says where the text broke."""
    answer = client.post(run_path("acme"), content=body.encode("latin-1"))
    reason = model_error(answer, 3010, 400, "malformed_body")
    assert reason.startswith("Invalid or incomplete input for the model: ")


@pytest.mark.parametrize("field", ["image", "mask"])
def test_bytes_that_are_no_picture_are_3010(client: httpx.Client, field: str) -> None:
    """What is an array of bytes, but not of a picture, is an invalid input for the model."""
    body = {"prompt": "x", "image": list(picture())} | {field: list(b"no picture")}
    reason = model_error(client.post(run_path("acme"), json=body), 3010, 400, "invalid_image")
    assert f"'/{field}' is not an image" in reason


def test_a_picture_that_breaks_off_is_3010(client: httpx.Client) -> None:
    """The header is sound, so only the worker finds out; the caller gets the same error."""
    cut = picture(256, 256)[:-200]
    answer = client.post(run_path("acme"), json={"prompt": "x", "image": list(cut)})
    assert "cut off" in model_error(answer, 3010, 400, "invalid_image")
    assert answer.headers.get("x-should-retry") != "true"


def test_a_body_above_the_limit_is_3006(client: httpx.Client) -> None:
    """Judged by its Content-Length, or as it arrives when it comes in chunks."""
    body = b'{"prompt": "' + b"x" * LIMIT + b'"}'
    for content in (body, iter([body[:1000], body[1000:]])):
        reason = model_error(client.post(run_path("acme"), content=content), 3006, 413, "request_too_large")
        assert f"at most {LIMIT} bytes" in reason


def test_an_input_that_the_model_refuses_is_3030(client: httpx.Client) -> None:
    """A refusal would come again, so it is the caller's error."""
    answer = client.post(run_path("acme"), json={"prompt": "fake:refuse"})
    assert model_error(answer, 3030, 400, "model_refused").startswith("Model input is not valid: ")


def test_a_failing_engine_is_500_and_not_to_be_repeated(client: httpx.Client) -> None:
    """The job has had its three attempts; an SDK that repeated the call would make nine of them."""
    answer = client.post(run_path("acme"), json={"prompt": "fake:fail"})
    model_error(answer, 3043, 500, "engine_failed")
    assert answer.headers["x-should-retry"] == "false"


def test_an_unknown_model_is_5007(client: httpx.Client) -> None:
    """A well-formed name of a model that is not served."""
    answer = client.post(run_path("acme", "@cf/meta/llama-3"), json={"prompt": "x"})
    assert model_error(answer, 5007, 400, "model_not_found") == "No such model @cf/meta/llama-3 or task"


@pytest.mark.parametrize("model", ["stable-diffusion", "@cf/runwayml", f"{MODEL}/more", "@cf/a b/c"])
def test_a_name_that_no_model_can_have_is_3042(client: httpx.Client, model: str) -> None:
    """Names are ``@cf/author/model``."""
    reason = model_error(client.post(run_path("acme", model), json={"prompt": "x"}), 3042, 404, "model_name_invalid")
    assert reason.startswith("The model name is invalid: ")


def test_an_unknown_account_id_cannot_be_routed(client: httpx.Client) -> None:
    """7003 names the path, as Cloudflare does."""
    path = run_path("not an account".replace(" ", "%20"))
    message = edge_error(client.post(path, json={"prompt": "x"}), 7003, 404, "not_found")
    assert message.startswith("Could not route to /client/v4/accounts/not an account/")
    assert message.endswith(", perhaps your object identifier is invalid?")


def test_no_key_is_9106(gateway: Gateway) -> None:
    """Without any credentials Cloudflare asks for the e-mail of its key mode."""
    with gateway.client() as nobody:
        answer = nobody.post(run_path("acme"), json={"prompt": "x"})
        assert edge_error(answer, 9106, 403, "missing_credentials") == "Missing X-Auth-Email header"


@pytest.mark.parametrize("header", [{"authorization": "Bearer wrong"}, {"x-auth-key": "wrong", "x-auth-email": "a@b"}])
def test_a_wrong_key_is_10000(gateway: Gateway, header: dict[str, str]) -> None:
    """A key that nobody knows, in either of the SDKs' modes."""
    with gateway.client(headers=header) as stranger:
        answer = stranger.post(run_path("acme"), json={"prompt": "x"})
        assert edge_error(answer, 10000, 401, "unauthenticated") == "Authentication error"


def test_another_accounts_key_is_10000(client: httpx.Client) -> None:
    """The key is good, but not for the account in the URL; nothing tells a stranger whether that one exists."""
    answers = [client.post(run_path(account), json={"prompt": "x"}) for account in ("umbrella", "nobody")]
    for answer in answers:
        assert edge_error(answer, 10000, 401, "account_mismatch") == "Authentication error"


@pytest.mark.parametrize("path", ["models/search", f"models/schema?model={MODEL}", "tasks/search"])
def test_every_route_asks_for_the_key(gateway: Gateway, client: httpx.Client, path: str) -> None:
    """What needs no model needs a key all the same."""
    with gateway.client() as nobody:
        edge_error(nobody.get(f"/client/v4/accounts/acme/ai/{path}"), 9106, 403, "missing_credentials")
    assert client.get(f"/client/v4/accounts/acme/ai/{path}").json()["success"] is True
    edge_error(client.get(f"/client/v4/accounts/umbrella/ai/{path}"), 10000, 401, "account_mismatch")


def test_the_key_mode_of_the_sdks_works(gateway: Gateway) -> None:
    """``X-Auth-Key`` with ``X-Auth-Email`` stands for the bearer token."""
    headers = {"x-auth-key": key_of("acme"), "x-auth-email": "somebody@example.com"}
    with gateway.client(headers=headers) as client:
        assert is_picture(client.post(run_path("acme"), json={"prompt": "x"}))


def test_a_refused_request_leaves_no_job(gateway: Gateway) -> None:
    """What is wrong is refused before anything is queued."""
    with gateway.client(headers=bearer("umbrella")) as client:
        for body in ({}, {"prompt": "x", "width": 1}, {"prompt": "x", "image": [1]}):
            assert client.post(run_path("umbrella"), json=body).status_code == 400
        assert jobs_of(client) == []


def test_reject_if_busy_is_3040_while_every_worker_is_busy(stack: Stack) -> None:
    """``options.rejectIfBusy`` refuses instead of queueing, says when to come again, and queues nothing."""
    gateway = stack.gateway(queue="busy")
    stack.worker(queue="busy", concurrency="1")
    body = {"prompt": "x", "options": {"rejectIfBusy": True}}
    with gateway.client(headers=bearer("acme")) as client:
        assert is_picture(client.post(run_path("acme"), json=body))
        slow = submit(client, prompt="fake:step=60")["id"]
        eventually(lambda: state_of(client, slow) == "running", "the only worker is busy")
        answer = client.post(run_path("acme"), json=body)
        reason = model_error(answer, 3040, 429, "no_capacity")
        assert reason == "Capacity temporarily exceeded, please try again."
        assert int(answer.headers["retry-after"]) >= 1
        client.post(f"/v1/jobs/{slow}/cancel")
        eventually(lambda: client.get("/v1/queue").json()["running"] == 0, "the worker is free again")
        assert is_picture(client.post(run_path("acme"), json=body))
