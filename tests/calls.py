"""What tests of the front ends share: pictures, accounts with keys, and how errors look in each dialect."""

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from PIL import Image

from tests.stack import eventually, state_of, submit

MODEL = "@cf/runwayml/stable-diffusion-v1-5-img2img"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MESSAGE = re.compile(r"AiError: (.*) \(([0-9a-f-]{36})\)", re.DOTALL)


def run_path(account: str = "local", model: str = MODEL) -> str:
    """Cloudflare's route; ``local`` is the account of everybody's native calls where there are no keys."""
    return f"/client/v4/accounts/{account}/ai/run/{model}"


def picture(width: int = 64, height: int = 48, form: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """An encoded file with a gradient, so that turning or cutting it shows."""
    gradient = Image.linear_gradient("L").resize((width, height))
    return encoded(Image.merge("RGB", (gradient, gradient.rotate(180), gradient)).convert(mode), form, **options)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """A decoded file; fails where it is cut off."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def write_tenants(path: Path, *accounts: str) -> str:
    """A tenants file in which each account has one key, ``key_of`` it."""
    entries = [
        f'[[tenants]]\naccount = "{name}"\nkey_sha256 = ["{hashlib.sha256(key_of(name).encode()).hexdigest()}"]\n'
        for name in accounts
    ]
    path.write_text("\n".join(entries))
    return str(path)


def key_of(account: str) -> str:
    return f"key-of-{account}"


def bearer(account: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key_of(account)}"}


def jobs_of(client: httpx.Client, account: str | None = None) -> list[dict[str, Any]]:
    """The account's jobs as the native API lists them, newest first."""
    answer = client.get("/v1/jobs", params={"limit": 100}, headers=bearer(account) if account else {})
    assert answer.status_code == 200, answer.text
    return answer.json()["jobs"]


@contextmanager
def blocked(client: httpx.Client) -> Iterator[None]:
    """Nothing is started until the block is left, where there is one worker with one slot."""
    blocker = submit(client, prompt="fake:step=60", options={"priority": 10})["id"]
    eventually(lambda: state_of(client, blocker) == "running", "the worker is held")
    try:
        yield
    finally:
        client.post(f"/v1/jobs/{blocker}/cancel")


def is_picture(answer: httpx.Response) -> bool:
    """A raw picture, as Cloudflare sends it: nothing around it, and an id in the header."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert UUID(answer.headers["cf-ai-req-id"])
    return answer.content.startswith(PNG_MAGIC)


def model_error(answer: httpx.Response, code: int, status: int, ours: str) -> str:
    """The reason in an error of Cloudflare's model layer, after checking its envelope and headers."""
    body = _envelope(answer, code, status, ours)
    assert body["result"] == {}
    match = MESSAGE.fullmatch(body["errors"][0]["message"])
    assert match, body
    assert match[2] == answer.headers["cf-ai-req-id"]
    return match[1]


def edge_error(answer: httpx.Response, code: int, status: int, ours: str) -> str:
    """The message of an error of Cloudflare's API, which the model never saw."""
    body = _envelope(answer, code, status, ours)
    assert body["result"] is None
    assert "cf-ai-req-id" not in answer.headers
    message: str = body["errors"][0]["message"]
    return message


def _envelope(answer: httpx.Response, code: int, status: int, ours: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    body: dict[str, Any] = answer.json()
    assert set(body) == {"result", "success", "errors", "messages"}
    assert body["success"] is False
    assert body["messages"] == []
    assert [error["code"] for error in body["errors"]] == [code], body
    assert answer.headers["img2img-error"] == ours
    return body


def problem(answer: httpx.Response, status: int, code: str, field: str | None = None) -> str:
    """The sentence of a native error, after checking its form (RFC 9457)."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    body = answer.json()
    assert set(body) - {"field", "eta_seconds"} == {"type", "title", "status", "detail", "code"}
    assert (body["status"], body["code"], body.get("field")) == (status, code, field), body
    assert answer.headers["img2img-error"] == code
    detail: str = body["detail"]
    return detail
