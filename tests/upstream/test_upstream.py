"""The stand-in for Cloudflare's API answers as the API was seen to answer."""

import base64
import io
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from h2.exceptions import H2Error
from PIL import Image

from tests.stack import DOG, eventually
from tests.upstream.api import MODEL, Api
from tests.upstream.behaviours import BEHAVIOURS
from tests.upstream.limits import Window
from tests.upstream.running import running_upstream
from tests.upstream.server import Upstream

AUTH = {"authorization": "Bearer secret"}
PATH = f"/accounts/acme/ai/run/{MODEL}"
BROKEN = {"close", "cut", "cut-chunked", "cut-head", "no-http", "reset", "reset-body", "too-long", "huge-head"}
BROKEN_STREAM = BROKEN | {"old-http", "too-short"}
SILENT = {"never", "stall", "hold"}


@pytest.fixture(scope="module", params=[False, True], ids=["HTTP/1.1", "HTTP/2"])
def upstream(request: pytest.FixtureRequest, certificate: tuple[Path, Path]) -> Iterator[Upstream]:
    with running_upstream(Api({"acme": "secret", "other": "word"}), certificate if request.param else None) as running:
        yield running


@pytest.fixture
def client(upstream: Upstream, certificate: tuple[Path, Path]) -> Iterator[httpx.Client]:
    upstream.api.reset()
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    with httpx.Client(
        base_url=upstream.url, headers=AUTH, http2=True, verify=trust, trust_env=False, timeout=10
    ) as client:
        yield client


def run(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(PATH, json={"prompt": "a lion", **fields})


def refusal(answer: httpx.Response) -> tuple[int, int]:
    """Status and number of an error in its envelope."""
    content = answer.json()
    assert content["success"] is False
    return answer.status_code, content["errors"][0]["code"]


def test_a_picture_of_512_pixels_without_an_envelope(client: httpx.Client) -> None:
    """Raw PNG, 512x512 unless asked otherwise, with an id and what it cost."""
    answer = run(client)

    assert answer.headers["content-type"] == "image/png"
    assert {"cf-ai-req-id", "cf-ray", "cf-ai-neurons", "ratelimit"} <= answer.headers.keys()
    assert Image.open(io.BytesIO(answer.content)).size == (512, 512)
    assert Image.open(io.BytesIO(run(client, width=256, height=320).content)).size == (256, 320)


def test_the_same_picture_whichever_way_the_image_came(client: httpx.Client) -> None:
    """As base64 or as integers; and another one without it."""
    dog = DOG.read_bytes()
    encoded = run(client, image_b64=base64.b64encode(dog).decode(), strength=0.5).content
    listed = run(client, image=list(dog), strength=0.5).content

    assert encoded == listed
    assert encoded != run(client, strength=0.5).content


@pytest.mark.parametrize(
    ("headers", "path", "refused"),
    [
        ({"authorization": ""}, PATH, (403, 9106)),
        ({"authorization": "Bearer wrong"}, PATH, (401, 10000)),
        ({"authorization": "Bearer word"}, PATH, (401, 10000)),
        (AUTH, PATH.replace("@cf/runwayml/", "@cf%2Frunwayml%2F"), (400, 7000)),
        (AUTH, "/accounts/acme/ai/ran", (400, 7000)),
        (AUTH, "/accounts/acme/ai/run/@cf/other/model", (400, 5007)),
    ],
    ids=["no token", "wrong token", "another account's token", "percent-encoded model", "no route", "another model"],
)
def test_what_the_edge_refuses(
    client: httpx.Client, headers: dict[str, str], path: str, refused: tuple[int, int]
) -> None:
    """Numbers and statuses are those that were seen."""
    assert refusal(client.post(path, json={"prompt": "a lion"}, headers=headers)) == refused


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        (b"", (400, 3003)),
        (b"{", (400, 3010)),
        (b"{}", (400, 5006)),
        (b'{"prompt": "a", "num_steps": 21}', (400, 5006)),
        (b'{"prompt": "a", "image": [1, 2, 3]}', (400, 3010)),
    ],
)
def test_what_the_model_layer_refuses(client: httpx.Client, body: bytes, refused: tuple[int, int]) -> None:
    """The schema first, in the words of Cloudflare's validator."""
    assert refusal(client.post(PATH, content=body)) == refused


def test_the_model_takes_so_many_a_minute(client: httpx.Client, upstream: Upstream) -> None:
    """What comes beyond gets 3021, and no Retry-After; the count says what it saw at most."""
    upstream.api.limit(3, 60.0, 100, 300.0)
    answers = [run(client) for _ in range(5)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert refusal(answers[-1]) == (429, 3021)
    assert "retry-after" not in answers[-1].headers
    seen = upstream.api.by_account.seen()["acme"]
    assert (seen.peak, seen.refused) == (5, 2)


def test_a_token_takes_so_many_in_five_minutes(client: httpx.Client, upstream: Upstream) -> None:
    """What comes beyond is told when to come back, and how many calls were left before."""
    upstream.api.limit(100, 60.0, 2, 300.0)
    answers = [run(client) for _ in range(3)]

    assert [answer.headers["ratelimit"].split(";")[1] for answer in answers] == ["r=1", "r=0", "r=0"]
    assert answers[2].status_code == 429
    assert 295 <= int(answers[2].headers["retry-after"]) <= 300


def test_a_window_slides() -> None:
    """A call counts until it is as old as the window is long, whatever came in between."""
    window = Window(2, 10.0)

    assert [window.count("k", now) for now in (0.0, 9.0, 9.5)] == [0, 0, 9.5]
    assert window.count("k", 19.2) == 0.0
    assert window.seen()["k"].peak == 3


def test_words_in_the_prompt_decide(client: httpx.Client) -> None:
    """One after another, each as many calls as it says; another seed begins anew."""
    prompt = "upstream:3040=2 upstream:html:520=1"
    assert [run(client, prompt=prompt).status_code for _ in range(4)] == [429, 429, 520, 200]
    assert run(client, prompt=prompt, seed=1).status_code == 429


def test_orders_for_anybody_and_for_an_account(client: httpx.Client) -> None:
    """Anybody's come before the account's, and the account's before the prompt's."""
    client.post("../../../control/script", json={"orders": ["3040=2"]})
    client.post("../../../control/script", json={"orders": ["3036=1"], "account": "acme"})
    codes = [refusal(run(client, prompt="upstream:3030"))[1] for _ in range(4)]

    assert codes == [3040, 3040, 3036, 3030]


def test_calls_can_be_read(client: httpx.Client) -> None:
    """What came, how it was answered, and how it ended."""
    answer = run(client, image_b64=base64.b64encode(DOG.read_bytes()).decode(), strength=0.5)
    (call,) = client.get("../../../control/calls").json()

    assert (call["account"], call["model"], call["image"], call["mask"]) == ("acme", MODEL, "image_b64", False)
    assert call["fields"] == {"prompt": "a lion", "strength": 0.5}
    assert (call["status"], call["ended"]) == (200, "answered")
    assert call["request_id"] == answer.headers["cf-ai-req-id"]


def test_a_caller_that_hangs_up_is_noticed(client: httpx.Client, upstream: Upstream) -> None:
    """Whether before the answer's head or in its middle."""
    for prompt in ("upstream:never", "upstream:stall"):
        with pytest.raises(httpx.ReadTimeout):
            client.post(PATH, json={"prompt": prompt}, timeout=httpx.Timeout(30, read=0.3))
    client.close()

    eventually(lambda: [call.ended for call in upstream.api.calls] == ["gone", "gone"], "both are taken down as gone")


@pytest.mark.parametrize("name", sorted(BEHAVIOURS.keys() - SILENT))
def test_every_behaviour_can_be_asked_for(client: httpx.Client, name: str) -> None:
    """Connections break where they should, and only there."""
    number = {"slow": ":0.1", "trickle": ":0.1", "huge": ":2"}.get(name, "")
    broken = BROKEN_STREAM if client.base_url.scheme == "https" else BROKEN
    try:
        answer = run(client, prompt=f"upstream:{name}{number}")
    except (httpx.TransportError, H2Error):  # httpx lets some of h2's pass as they are
        assert name in broken
    else:
        assert name not in broken
        assert answer.http_version == "HTTP/2" if client.base_url.scheme == "https" else answer.http_version != "HTTP/2"
        if answer.headers.get("content-type") == "application/json" and name != "json-cut":
            json.loads(answer.content)
