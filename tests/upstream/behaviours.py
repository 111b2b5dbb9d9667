"""Every way in which the stand-in can answer a good request, by name."""

import base64
import gzip
import io
import math
from collections.abc import Callable
from typing import Any, Final

import msgspec
from PIL import Image

from tests.upstream.answers import DAILY, ERRORS, Answer, as_json, envelope, failure, page
from tests.upstream.pictures import bomb, encoded

MIB: Final = 1024 * 1024


class Context(msgspec.Struct, frozen=True):
    """What a behaviour may use: the right answer's PNG, the call's id, and the number behind the name, if any."""

    png: bytes
    request_id: str
    number: float | None = None

    @property
    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png))


Behaviour = Callable[[Context], Answer]


def picture(context: Context, data: bytes | None = None, **how: Any) -> Answer:
    """The picture as Cloudflare sends it: raw bytes labelled PNG, whatever they are."""
    headers = {"content-type": "image/png", "cf-ai-neurons": "12.5", **how.pop("headers", {})}
    return Answer(body=context.png if data is None else data, headers=headers, **how)


def _converted(context: Context, mode: str) -> bytes:
    return encoded(context.picture.convert(mode), "PNG")


def _base64(context: Context) -> str:
    return base64.b64encode(context.png).decode()


def _enveloped(context: Context) -> Answer:
    result = {"image": _base64(context)}
    return as_json({"result": result, "success": True, "errors": [], "messages": []})


def _throttled(context: Context) -> Answer:
    seconds = f"{context.number or 1:g}"
    headers = {"retry-after": seconds, "ratelimit": f'"default";r=0;t={seconds}'}
    return msgspec.structs.replace(
        failure(971, context.request_id), headers={"content-type": "application/json", **headers}
    )


def _animated(context: Context) -> bytes:
    frames = [context.picture, Image.new("RGB", context.picture.size)]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


def _resized(context: Context) -> bytes:
    side = int(context.number or 64)
    return encoded(context.picture.resize((side, side)), "PNG")


def _error(code: int) -> Behaviour:
    return lambda context: failure(code, context.request_id)


BEHAVIOURS: Final[dict[str, Behaviour]] = {
    # Pictures, well or badly labelled and sent.
    "ok": picture,
    "slow": lambda c: picture(c, delay=c.number or 1.0),
    "trickle": lambda c: picture(c, pace=c.number or 1.0),
    "hold": lambda c: picture(c, hold=True),
    "chunked": lambda c: picture(c, chunked=True),
    "gzip": lambda c: picture(c, gzip.compress(c.png), headers={"content-encoding": "gzip"}),
    "unlabelled": lambda c: picture(c, headers={"content-type": "application/octet-stream"}),
    "jpeg": lambda c: picture(c, encoded(c.picture, "JPEG")),
    "webp": lambda c: picture(c, encoded(c.picture, "WEBP", lossless=True)),
    "rgba": lambda c: picture(c, _converted(c, "RGBA")),
    "palette": lambda c: picture(c, _converted(c, "P")),
    "grey": lambda c: picture(c, _converted(c, "L")),
    "deep": lambda c: picture(c, _converted(c, "I;16")),
    "animated": lambda c: picture(c, _animated(c)),
    "size": lambda c: picture(c, _resized(c)),
    "bomb": lambda c: picture(c, bomb(int(c.number or 30_000))),
    "json": _enveloped,
    "json-bare": lambda c: as_json({"image": _base64(c)}),
    "json-data-url": lambda c: as_json({"result": {"image": f"data:image/png;base64,{_base64(c)}"}, "success": True}),
    "closing": lambda c: picture(c, headers={"connection": "close"}, end="close"),
    "closing-unsaid": lambda c: picture(c, end="close"),
    "old-http": lambda c: picture(c, wire=b"HTTP/1.0 200 OK\r\ncontent-type: image/png\r\n\r\n" + c.png, end="close"),
    "free": lambda c: picture(c, headers={"cf-ai-neurons": ""}),
    # Answers with status 200 that are no picture.
    "empty": lambda c: picture(c, b""),
    "garbage": lambda c: picture(c, bytes(range(256)) * 16),
    "truncated": lambda c: picture(c, c.png[: len(c.png) // 2]),
    "damaged": lambda c: picture(c, c.png[:-40] + bytes(40)),
    "text": lambda c: page(200, "Checking your browser"),
    "json-empty": lambda c: as_json({"result": {}, "success": True, "errors": [], "messages": []}),
    "json-garbage": lambda c: as_json({"result": {"image": "not base64!"}, "success": True}),
    "json-cut": lambda c: Answer(body=b'{"result": {"ima', headers={"content-type": "application/json"}),
    "json-list": lambda c: as_json([1, 2, 3]),
    "json-null": lambda c: as_json(None),
    "unsuccessful": lambda c: msgspec.structs.replace(failure(3040, c.request_id), status=200),
    "gzip-bomb": lambda c: picture(c, gzip.compress(bytes(64 * MIB), 1), headers={"content-encoding": "gzip"}),
    "huge": lambda c: Answer(
        body=bytes(MIB), repeat=int(c.number or 256), chunked=True, headers={"content-type": "image/png"}
    ),
    "no-content": lambda c: Answer(status=204, declared=-1),
    "redirect": lambda c: Answer(status=302, headers={"location": "http://127.0.0.1:1/elsewhere"}),
    # Errors in other shapes than the usual one.
    **{str(code): _error(code) for code in ERRORS},
    "3040-object": lambda c: envelope(429, {"code": 3040, "message": ERRORS[3040].text}, as_object=True),
    "flagged": lambda c: failure(3030, c.request_id, "Model input is not valid: output has been flagged"),
    "allocation": lambda c: envelope(429, {"code": 10_001, "message": f"AiError: {DAILY} ({c.request_id})"}),
    "uncoded": lambda c: as_json({"success": False, "errors": [{"message": "something"}], "result": None}, status=400),
    "no-errors": lambda c: as_json({"success": False, "errors": [], "result": None}, status=500),
    "throttled": _throttled,
    "html": lambda c: page(int(c.number or 502), "Bad gateway"),
    "plain": lambda c: Answer(status=int(c.number or 500), body=b"error", headers={"content-type": "text/plain"}),
    "blank": lambda c: Answer(status=int(c.number or 500)),
    # Trouble on the way.
    "never": lambda c: picture(c, delay=math.inf),
    "stall": lambda c: picture(c, pace=math.inf),
    "cut": lambda c: picture(c, sent=len(c.png) // 2, end="close"),
    "cut-chunked": lambda c: picture(c, chunked=True, sent=len(c.png) // 2, end="close"),
    "too-long": lambda c: picture(c, declared=len(c.png) + 100, end="close"),
    "too-short": lambda c: picture(c, declared=len(c.png) - 100, end="close"),
    "close": lambda c: Answer(wire=b"", end="close"),
    "reset": lambda c: Answer(wire=b"", end="reset"),
    "reset-body": lambda c: picture(c, sent=len(c.png) // 2, end="reset"),
    "cut-head": lambda c: Answer(wire=b"HTTP/1.1 200 OK\r\ncontent-ty", end="close"),
    "no-http": lambda c: Answer(wire=b"\x00\x01 hello\r\n\r\n", end="close"),
    "huge-head": lambda c: Answer(headers={f"x-filler-{number}": "x" * 4096 for number in range(64)}),
}
