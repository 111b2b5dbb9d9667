"""Cloudflare's dialect: every way in which its SDKs and its page's curl ask for a picture, and what they get."""

import base64
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from img2img.schema import INPUT_SCHEMA
from tests.calls import MODEL, PNG_MAGIC, edge_error, encoded, is_picture, model_error, opened, picture, run_path
from tests.stack import DOG, Gateway, Stack

SEED_BODY = '{ "prompt": "cyberpunk cat" }'


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        gateway = stack.gateway()
        stack.worker(concurrency="4")
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def test_a_prompt_alone_is_a_picture(client: httpx.Client) -> None:
    """Text to image: raw PNG bytes without an envelope, in the model's own size."""
    answer = client.post(run_path(), content=SEED_BODY)
    assert is_picture(answer)
    assert opened(answer.content).size == (256, 256)
    assert answer.headers["img2img-job-id"]


@pytest.mark.parametrize("model", [MODEL, MODEL.replace("/", "%2F"), MODEL.replace("/", "%2f"), f"{MODEL}/"])
def test_the_model_may_be_spelt_with_a_slash_or_encoded(client: httpx.Client, model: str) -> None:
    """Python 4.x, npm 4.x and curl send ``/``, Python 5.x and npm 7.x ``%2F``."""
    assert is_picture(client.post(run_path(model=model), content=SEED_BODY))


def test_the_pages_curl_gets_its_picture(gateway: Gateway, tmp_path: Path) -> None:
    """The documented command, word for word but for the host; curl calls its body a form."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl on this machine")
    command = [curl, "--silent", "--noproxy", "*", f"{gateway.http}{run_path('023e105f')}", "-X", "POST"]
    command += ["-H", "Authorization: Bearer anything", "-d", SEED_BODY, "--output", str(tmp_path / "cat.png")]
    command += ["--write-out", "%{http_code} %{content_type}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "200 image/png"
    assert (tmp_path / "cat.png").read_bytes().startswith(PNG_MAGIC)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json; charset=utf-8",
        "application/x-www-form-urlencoded",
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "nonsense",
    ],
)
def test_the_body_is_json_whatever_its_type_says(client: httpx.Client, content_type: str | None) -> None:
    """Cloudflare never looks at the Content-Type of a run."""
    headers = {} if content_type is None else {"content-type": content_type}
    assert is_picture(client.post(run_path(), content=SEED_BODY, headers=headers))


@pytest.mark.parametrize("accept", ["application/json", "text/html", "image/jpeg", "*/*;q=0", "nonsense"])
def test_no_accept_header_is_refused(client: httpx.Client, accept: str) -> None:
    """The SDKs say that they accept JSON and expect a PNG: never 406."""
    assert is_picture(client.post(run_path(), content=SEED_BODY, headers={"accept": accept}))
    assert model_error(client.post(run_path(), content="{}", headers={"accept": accept}), 5006, 400, "invalid_request")


def test_every_answer_has_an_id_of_its_own(client: httpx.Client) -> None:
    """``cf-ai-req-id`` names one call, not one job."""
    answers = [client.post(run_path(), json={"prompt": "x", "seed": 1}) for _ in range(2)]
    answers.append(client.post(run_path(), content="{}"))
    assert len({answer.headers["cf-ai-req-id"] for answer in answers}) == 3


def test_an_image_is_taken_as_integers_or_base64(client: httpx.Client) -> None:
    """``image`` and ``image_b64`` are two spellings of the same file, a ``data:`` prefix included."""
    data, asked = DOG.read_bytes(), {"prompt": "Change to a lion", "seed": 7, "num_steps": 4, "strength": 0.5}
    encoded = base64.b64encode(data).decode()
    spellings: list[dict[str, Any]] = [
        {"image": list(data)},
        {"image": [float(byte) for byte in data[:2]] + list(data[2:])},
        {"image_b64": encoded},
        {"image_b64": f"data:image/png;base64,{encoded}"},
    ]
    answers = [client.post(run_path(), json=asked | spelling) for spelling in spellings]
    assert all(is_picture(answer) for answer in answers)
    assert len({answer.content for answer in answers}) == 1
    other = client.post(run_path(), json=asked | {"image": list(picture())})
    assert other.content != answers[0].content


def test_white_in_the_mask_is_drawn_anew(client: httpx.Client) -> None:
    """Where the mask is black, the picture that was sent stays."""
    sent = picture(256, 256)
    black, white = (encoded(Image.new("L", (256, 256), shade)) for shade in (0, 255))
    kept = client.post(run_path(), json={"prompt": "x", "image": list(sent), "mask": list(black)})
    redrawn = client.post(run_path(), json={"prompt": "x", "image": list(sent), "mask": list(white)})
    assert is_picture(kept)
    assert is_picture(redrawn)
    assert opened(kept.content).tobytes() == opened(sent).tobytes()
    assert opened(redrawn.content).tobytes() != opened(sent).tobytes()


def test_every_field_reaches_the_job(client: httpx.Client) -> None:
    """The eleven fields of the schema, as they were sent, are what the job records; 20.0 counts as 20."""
    body = {
        "prompt": "a lion",
        "negative_prompt": "blurry",
        "height": 264,
        "width": 512.0,
        "image": list(picture()),
        "mask": list(picture(8, 8)),
        "num_steps": 10.0,
        "strength": 0.5,
        "guidance": 3,
        "seed": 2**53,
    }
    answer = client.post(run_path(), json=body)
    assert is_picture(answer)
    assert opened(answer.content).size == (512, 264)
    job = client.get(f"/v1/jobs/{answer.headers['img2img-job-id']}").json()
    shown = job["parameters"]
    assert (shown.pop("image")["format"], shown.pop("mask")["width"]) == ("PNG", 8)
    assert shown == {name: value for name, value in body.items() if name not in ("image", "mask")}
    assert any("mask" in warning for warning in job["warnings"])


def test_unknown_fields_are_accepted(client: httpx.Client) -> None:
    """Cloudflare ignores what its schema does not name, its own ``options`` included."""
    body = {"prompt": "x", "num_step": 3, "stream": True, "options": {"rejectIfBusy": False, "other": 1}}
    assert is_picture(client.post(run_path(), json=body))
    assert is_picture(client.post(run_path(), json={"prompt": "x", "options": "anything"}))


def test_headers_of_the_sdks_are_accepted(client: httpx.Client) -> None:
    """``api-version`` and what the SDKs tell of themselves change nothing."""
    headers = {"api-version": "2024-01-01", "x-stainless-lang": "python", "x-stainless-retry-count": "0"}
    assert is_picture(client.post(run_path(), content=SEED_BODY, headers=headers))


# The other routes of the SDKs


def ai(path: str, account: str = "local") -> str:
    return f"/client/v4/accounts/{account}/ai/{path}"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, 1),
        ({"author": "runwayml"}, 1),
        ({"author": "RunwayML"}, 1),
        ({"author": "meta"}, 0),
        ({"task": "Text-to-Image"}, 1),
        ({"task": "Translation"}, 0),
        ({"search": "img2img"}, 1),
        ({"search": "llama"}, 0),
        ({"hide_experimental": "false"}, 1),
        ({"hide_experimental": "true"}, 0),
        ({"author": "runwayml", "search": "llama"}, 0),
        ({"source": "1"}, 1),
    ],
)
def test_models_are_found_by_every_filter(client: httpx.Client, query: dict[str, str], found: int) -> None:
    """The one model is listed when all filters match; it is a beta, which is what "experimental" hides."""
    body = client.get(ai("models/search"), params=query).json()
    assert [model["name"] for model in body["result"]] == [MODEL] * found
    assert (body["success"], body["errors"], body["result_info"]["total_count"]) == (True, [], found)


def test_models_come_in_pages(client: httpx.Client) -> None:
    """``result_info`` says where in the list the page is; pages beyond the end are empty."""
    first = client.get(ai("models/search"), params={"page": 1, "per_page": 1}).json()
    second = client.get(ai("models/search"), params={"page": 2, "per_page": 1}).json()
    assert (len(first["result"]), len(second["result"])) == (1, 0)
    assert second["result_info"] == {"count": 0, "page": 2, "per_page": 1, "total_count": 1}


@pytest.mark.parametrize("query", [{"page": "x"}, {"page": "0"}, {"per_page": "101"}, {"hide_experimental": "maybe"}])
def test_a_wrong_query_is_named(client: httpx.Client, query: dict[str, str]) -> None:
    """A query that cannot be read is 5006 with the parameter's name."""
    reason = model_error(client.get(ai("models/search"), params=query), 5006, 400, "invalid_request")
    assert f"'{next(iter(query))}'" in reason


def test_a_models_schema_is_the_published_one(client: httpx.Client) -> None:
    """``models/schema`` answers the input schema that this service validates by, and the output."""
    body = client.get(ai("models/schema"), params={"model": MODEL}).json()
    assert body["success"] is True
    assert body["result"]["input"] == INPUT_SCHEMA
    assert body["result"]["output"]["contentType"] == "image/png"
    assert "'model'" in model_error(client.get(ai("models/schema")), 5006, 400, "invalid_request")
    other = client.get(ai("models/schema"), params={"model": "@cf/meta/llama"})
    assert model_error(other, 5007, 400, "model_not_found") == "No such model @cf/meta/llama or task"


def test_tasks_are_listed(client: httpx.Client) -> None:
    """The task that the model's card names is the one that there is."""
    tasks = client.get(ai("tasks/search")).json()["result"]
    card = client.get(ai("models/search")).json()["result"][0]
    assert tasks == [card["task"]]


@pytest.mark.parametrize("path", ["/client/v4", "/client/v4/user/tokens/verify", ai("finetunes"), run_path(model="")])
def test_other_routes_of_cloudflare_are_no_routes(client: httpx.Client, path: str) -> None:
    """What is not served is refused in Cloudflare's words, not in ours."""
    assert edge_error(client.post(path, content=SEED_BODY), 7000, 400, "http") == "No route for that URI"


def test_a_run_is_a_post(client: httpx.Client) -> None:
    """The wrong method is 405 in the envelope."""
    edge_error(client.get(run_path()), 10405, 405, "http")
