"""The API behind the connections: checks a request as Cloudflare does, and decides on the answer."""

import asyncio
import json
import math
import re
import time
import uuid
from typing import Any, Final, NoReturn

import msgspec

from img2img.errors import InvalidRequest
from img2img.schema import validate
from tests.upstream.answers import Answer, as_json, failure
from tests.upstream.behaviours import BEHAVIOURS, Context
from tests.upstream.calls import Call
from tests.upstream.limits import Window
from tests.upstream.pictures import paint
from tests.upstream.script import ANYBODY, Script

MODEL: Final = "@cf/runwayml/stable-diffusion-v1-5-img2img"
ROUTE: Final = re.compile(r"/client/v4/accounts/([\w-]+)/ai/run/(.+)")
PICTURES: Final = ("image", "image_b64", "mask")


class Request(msgspec.Struct, frozen=True):
    """An HTTP request; names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Refused(Exception):
    """The request gets this answer, and does not reach the script."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.code)
        self.answer = answer


class Api:
    """Accounts, limits, script and record; ``tokens`` are those of each account, None takes any token for any.

    ``delay`` is what every good answer takes (seconds). The limits are Cloudflare's own unless told otherwise: requests
    to the model a minute and account, and requests to the API in five minutes and token. ``most_open`` is the highest
    number of calls under way at once.
    """

    def __init__(self, tokens: dict[str, str] | None = None, delay: float = 0.0) -> None:
        self.tokens = tokens
        self.delay = delay
        self.open = 0
        self.reset()

    def reset(self) -> None:
        """Forget calls, counts and orders; tokens and delay stay."""
        self.script = Script()
        self.calls: list[Call] = []
        self.most_open = self.open
        self.released = asyncio.Event()
        self.limit(1500, 60.0, 1200, 300.0)
        self._began = time.monotonic()

    def limit(self, model: int, model_seconds: float, token: int, token_seconds: float) -> None:
        """Set both limits, and count anew."""
        self.by_account, self.by_token = Window(model, model_seconds), Window(token, token_seconds)

    def now(self) -> float:
        return time.monotonic() - self._began

    def begin(self, request: Request) -> Call:
        """Take the request down."""
        headers = {
            name: value for name, value in request.headers.items() if name not in ("authorization", "x-auth-key")
        }
        call = Call(number=len(self.calls) + 1, at=self.now(), path=request.path, headers=headers)
        call.body_bytes = len(request.body)
        self.calls.append(call)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        return call

    def end(self, call: Call) -> None:
        """The call's connection or stream is done with it."""
        call.ended_at = self.now()
        self.open -= 1

    async def answer(self, call: Call, request: Request) -> Answer:
        """What the call gets; its record is filled in on the way."""
        ray = {"cf-ray": f"{uuid.uuid4().hex[:16]}-TST", "server": "cloudflare"}
        call.request_id = str(uuid.uuid4())
        try:
            self._check_edge(call, request)
            ray["ratelimit"] = self.by_token.header(call.token, self.now())
            ray["cf-ai-req-id"] = call.request_id
            self._check_input(call, request)
            answer = await self._behave(call, request)
        except Refused as refused:
            answer = refused.answer
        headers = ray | answer.headers
        call.status, call.code = answer.status, answer.code
        return msgspec.structs.replace(answer, headers={name: value for name, value in headers.items() if value})

    def _check_edge(self, call: Call, request: Request) -> None:
        """Credentials, route and the token's count, which the API checks before anything reaches a model."""
        headers = request.headers
        call.token = headers.get("x-auth-key") or headers.get("authorization", "").removeprefix("Bearer ")
        if not call.token:
            self._refuse(call, 9106)
        route = ROUTE.fullmatch(request.path.partition("?")[0])
        if route is None or "%" in route[2]:
            self._refuse(call, 7000)
        call.account, call.model = route[1], route[2]
        if self.tokens is not None and self.tokens.get(call.account) != call.token:
            self._refuse(call, 10000)
        if request.method != "POST":
            self._refuse(call, 10405)
        if wait := self.by_token.count(call.token, self.now()):
            refused = failure(971, call.request_id)
            throttled = {"retry-after": str(math.ceil(wait)), "ratelimit": self.by_token.header(call.token, self.now())}
            raise Refused(msgspec.structs.replace(refused, headers=refused.headers | throttled))

    def _check_input(self, call: Call, request: Request) -> None:
        if call.model != MODEL:
            self._refuse(call, 5007, f"No such model {call.model} or task")
        if self.by_account.count(call.account, self.now()):
            self._refuse(call, 3021)
        if not request.body:
            self._refuse(call, 3003)
        try:
            fields = validate(json.loads(request.body))
        except InvalidRequest as exc:
            self._refuse(call, 5006, f"Bad input: Error: {exc}")
        except ValueError:
            self._refuse(call, 3010)
        call.image = next((form for form in ("image", "image_b64") if form in fields), "")
        call.mask = "mask" in fields
        call.fields = {name: value for name, value in fields.items() if name not in PICTURES}

    async def _behave(self, call: Call, request: Request) -> Answer:
        try:
            order = self.script.choose(call.account, call.fields)
            png = await asyncio.to_thread(paint, request.body)
        except ValueError as exc:
            self._refuse(call, 3010, f"Invalid or incomplete input for the model: {exc}")
        call.behaviour = order.name
        answer = BEHAVIOURS[order.name](Context(png, call.request_id, order.number))
        return msgspec.structs.replace(answer, delay=answer.delay or (self.delay if answer.status == 200 else 0.0))

    def _refuse(self, call: Call, code: int, reason: str | None = None) -> NoReturn:
        raise Refused(failure(code, call.request_id, reason))

    def control(self, request: Request) -> Answer:
        """``/control/…``: read the record, set what the stand-in does."""
        given: dict[str, Any] = json.loads(request.body or b"{}")
        match request.method, request.path.removeprefix("/control/"):
            case "GET", "calls":
                return as_json(msgspec.to_builtins(self.calls))
            case "GET", "limits":
                windows = {"accounts": self.by_account.seen(), "tokens": self.by_token.seen()}
                return as_json(msgspec.to_builtins(windows) | {"most_open": self.most_open})
            case "POST", "limits":
                self.limit(given["model"], given["model_seconds"], given["token"], given["token_seconds"])
            case "POST", "script":
                self.script.order(*given["orders"], account=given.get("account", ANYBODY))
            case "POST", "delay":
                self.delay = float(given["seconds"])
            case "POST", "release":
                self.released.set()
            case "POST", "reset":
                self.reset()
            case _:
                return as_json({"error": "see tests/upstream/api.py"}, status=404)
        return as_json({})
