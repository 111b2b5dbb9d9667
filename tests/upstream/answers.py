"""One answer of the stand-in, down to how its bytes are sent, and the envelopes that Cloudflare's answers come in."""

import json
from typing import Any, Final, Literal

import msgspec


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A response and the manner in which it is sent.

    ``delay`` comes before its first byte (seconds, may be infinite), ``pace`` is the time over which the body is spread
    (seconds). With ``hold`` it waits for ``POST /control/release``. ``declared`` is the Content-Length that is told
    (bytes; None: the true one), -1 stands for none at all. Only ``sent`` bytes of the body are sent (None: all), and
    then the connection is kept, closed or reset. ``wire`` replaces head and body. ``repeat`` sends the body as often.
    """

    status: int = 200
    headers: dict[str, str] = {}
    body: bytes = b""
    code: int | None = None
    delay: float = 0.0
    pace: float = 0.0
    hold: bool = False
    declared: int | None = None
    chunked: bool = False
    sent: int | None = None
    repeat: int = 1
    end: Literal["keep", "close", "reset"] = "keep"
    wire: bytes | None = None


class Known(msgspec.Struct, frozen=True):
    """An error that Cloudflare documents or was seen to send; one at the API's ``edge`` did not reach the model."""

    code: int
    status: int
    text: str
    edge: bool = False


DAILY: Final = (
    "you have used up your daily free allocation of 10,000 neurons, "
    "please upgrade to Cloudflare's Workers Paid plan if you would like to continue usage."
)
ERRORS: Final = {
    error.code: error
    for error in (
        Known(3003, 400, "Request is missing headers or body: body"),
        Known(3006, 413, "Request is too large"),
        Known(3007, 408, "Request timeout"),
        Known(3008, 408, "Request was aborted"),
        Known(3010, 400, "Invalid or incomplete input for the model: image"),
        Known(3021, 429, "rate limiting: inference request per min rate reached"),
        Known(3023, 403, "Service unavailable for account"),
        Known(3030, 400, "Model input is not valid"),
        Known(3036, 429, DAILY),
        Known(3040, 429, "Capacity temporarily exceeded, please try again."),
        Known(3041, 403, "account not allowed to access this model"),
        Known(3042, 404, "The model name is invalid"),
        Known(3043, 500, "Internal server error"),
        Known(4006, 429, DAILY),
        Known(5004, 400, "Invalid data type for base64 input: image_b64"),
        Known(5006, 400, "Bad input: Error: '/num_steps' must be <= 20"),
        Known(5007, 400, "No such model @cf/runwayml/stable-diffusion-v1-5-img2img or task"),
        Known(5018, 403, "This account is not allowed to access this model."),
        Known(971, 429, "Please wait and consider throttling your request speed", edge=True),
        Known(7000, 400, "No route for that URI", edge=True),
        Known(7003, 404, "Could not route to that path, perhaps your object identifier is invalid?", edge=True),
        Known(9106, 403, "Missing X-Auth-Email header", edge=True),
        Known(10000, 401, "Authentication error", edge=True),
        Known(10405, 405, "Method not allowed for this authentication scheme", edge=True),
    )
}


def failure(code: int, request_id: str, reason: str | None = None, **how: Any) -> Answer:
    """The error ``code`` in its envelope; ``reason`` replaces its text, ``how`` are further fields of ``Answer``."""
    known = ERRORS[code]
    text = reason or known.text
    message = text if known.edge else f"AiError: {text} ({request_id})"
    return envelope(known.status, {"code": code, "message": message}, edge=known.edge, **how)


def envelope(status: int, error: dict[str, Any], *, edge: bool = False, as_object: bool = False, **how: Any) -> Answer:
    """An error's envelope; ``as_object``: ``errors`` is no list, as some answers have it."""
    content = {"result": None if edge else {}, "success": False, "errors": error if as_object else [error]}
    return as_json(content | {"messages": []}, status=status, code=error.get("code"), **how)


def as_json(content: Any, headers: dict[str, str] | None = None, **how: Any) -> Answer:
    return Answer(
        body=json.dumps(content).encode(), headers={"content-type": "application/json", **(headers or {})}, **how
    )


def page(status: int, title: str, **how: Any) -> Answer:
    """What a machine in front of the API says when it gets no answer from behind."""
    body = f"<!DOCTYPE html><html><head><title>{status}: {title}</title></head><body>cloudflare</body></html>"
    return Answer(status=status, body=body.encode(), headers={"content-type": "text/html; charset=UTF-8"}, **how)
