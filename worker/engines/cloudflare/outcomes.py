"""What an upstream's answer means: the one table. Its own code counts first, the HTTP status second."""

import re
from enum import Enum, auto
from typing import Any, Final

import msgspec

from worker.engines.cloudflare.exchange import UNREADABLE, Answer

MAX_WORDS: Final = 500
DECORATION: Final = re.compile(r"^\s*(?:AiError:\s*)+|\s*\([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\)\s*$", re.I)
USED_UP: Final = "daily free allocation"
FLAGGED: Final = "flagged"


class Action(Enum):
    """What to do about an outcome."""

    TAKE = auto()
    """Take the picture."""
    WAIT = auto()
    """Call again after a pause; the job goes back into the queue when that does not help, at no cost."""
    AGAIN = auto()
    """Call again after a pause; the attempt has failed when that does not help."""
    FAIL = auto()
    """The attempt has failed at once: the call was billed, and the next would be."""
    SWITCH = auto()
    """Call with another account; without one the job fails."""
    STOP = auto()
    """The job fails: the upstream takes no such call."""
    REFUSE = auto()
    """The job fails: the upstream does not take this input."""
    CENSOR = auto()
    """The job fails: the upstream flagged the picture."""


class Outcome(Enum):
    """How a call can end, and what is done about it."""

    PICTURE = "picture", Action.TAKE
    CAPACITY = "capacity", Action.WAIT  # out of GPUs for the moment
    RATE = "rate", Action.WAIT  # more calls a minute than it takes
    DAY_USED_UP = "day_used_up", Action.WAIT  # the account's neurons, until 00:00 UTC
    TIMEOUT = "timeout", Action.AGAIN
    ABORTED = "aborted", Action.AGAIN
    FAILED = "failed", Action.AGAIN  # an error of its own
    UNREACHABLE = "unreachable", Action.AGAIN  # the call was not sent
    LOST = "lost", Action.AGAIN  # it was sent, and no answer came
    NO_PICTURE = "no_picture", Action.FAIL  # a good answer without a picture that can be used
    DENIED = "denied", Action.SWITCH  # the token, or what its account may do
    NO_ROUTE = "no_route", Action.STOP  # no such address, model or method
    BAD_INPUT = "bad_input", Action.REFUSE
    TOO_LARGE = "too_large", Action.REFUSE
    FLAGGED = "flagged", Action.CENSOR

    def __init__(self, label: str, action: Action) -> None:
        self.label = label
        self.action = action


CODES: Final[dict[int, Outcome]] = {
    971: Outcome.RATE,
    3003: Outcome.BAD_INPUT,
    3006: Outcome.TOO_LARGE,
    3007: Outcome.TIMEOUT,
    3008: Outcome.ABORTED,
    3010: Outcome.BAD_INPUT,
    3021: Outcome.RATE,
    3023: Outcome.DENIED,
    3030: Outcome.BAD_INPUT,
    3036: Outcome.DAY_USED_UP,
    3040: Outcome.CAPACITY,
    3041: Outcome.DENIED,
    3042: Outcome.NO_ROUTE,
    3043: Outcome.FAILED,
    4006: Outcome.DAY_USED_UP,
    5004: Outcome.BAD_INPUT,
    5006: Outcome.BAD_INPUT,
    5007: Outcome.NO_ROUTE,
    5018: Outcome.DENIED,
    7000: Outcome.NO_ROUTE,
    7003: Outcome.NO_ROUTE,
    9106: Outcome.DENIED,
    9109: Outcome.DENIED,
    10000: Outcome.DENIED,
    10405: Outcome.NO_ROUTE,
}
STATUSES: Final[dict[int, Outcome]] = {
    200: Outcome.PICTURE,
    400: Outcome.BAD_INPUT,
    401: Outcome.DENIED,
    402: Outcome.DENIED,
    403: Outcome.DENIED,
    404: Outcome.NO_ROUTE,
    405: Outcome.NO_ROUTE,
    408: Outcome.TIMEOUT,
    413: Outcome.TOO_LARGE,
    422: Outcome.BAD_INPUT,
    429: Outcome.RATE,
}
FAMILIES: Final[dict[int, Outcome]] = {
    2: Outcome.NO_PICTURE,
    3: Outcome.NO_ROUTE,
    4: Outcome.NO_ROUTE,
    5: Outcome.FAILED,
}
"""For a status without an entry, by its first digit."""


class Verdict(msgspec.Struct, frozen=True):
    """An outcome, and the upstream's own words about it ("" about a picture)."""

    outcome: Outcome
    words: str = ""


def classify(answer: Answer) -> Verdict:
    """What ``answer`` means; a ``PICTURE`` may turn out to be none when it is decoded."""
    code, words = _error(answer.body) if _is_json(answer) else (None, "")
    outcome = CODES.get(code) if code is not None else None
    if outcome is None:
        outcome = STATUSES.get(answer.status) or FAMILIES.get(answer.status // 100, Outcome.FAILED)
        if outcome is Outcome.PICTURE and (code is not None or words):
            outcome = Outcome.FAILED  # an error that calls itself a success
    if USED_UP in words.lower():
        outcome = Outcome.DAY_USED_UP
    elif code == 3030 and FLAGGED in words.lower():
        outcome = Outcome.FLAGGED
    if outcome is not Outcome.PICTURE:
        words = words or f"HTTP status {answer.status}"
    return Verdict(outcome, words)


def _is_json(answer: Answer) -> bool:
    """Whether to look for an error: pictures are not parsed for one."""
    return answer.status != 200 or "json" in answer.headers.get("content-type", "")


def _error(body: bytes) -> tuple[int | None, str]:
    """The first error's code, and what it says; ``errors`` may be a list or an object, and the body may be anything."""
    try:
        content = msgspec.json.decode(body)
    except UNREADABLE:
        return None, ""
    errors: Any = content.get("errors") if isinstance(content, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else errors
    if not isinstance(first, dict):
        return None, ""
    code, message = first.get("code"), first.get("message")
    return _number(code), _plain(message) if isinstance(message, str) else ""


def _number(code: object) -> int | None:
    if isinstance(code, int):
        return code
    return int(code) if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) < 10 else None


def _plain(message: str) -> str:
    """Without "AiError:" and the call's id, which a job has elsewhere."""
    return DECORATION.sub("", message).strip()[:MAX_WORDS]
