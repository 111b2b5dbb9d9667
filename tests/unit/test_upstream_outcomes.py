"""What an upstream's answer means: its own number first, the HTTP status second."""

import json
from typing import Any

import pytest

from worker.engines.cloudflare.called import Called
from worker.engines.cloudflare.exchange import Answer
from worker.engines.cloudflare.hints import hold_seconds, neurons, retry_after
from worker.engines.cloudflare.outcomes import CODES, Action, Outcome, Verdict, classify

UUID = "0191e2b4-7c1f-7c55-9a44-2f8f6b1f2a11"
PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}


def failure(status: int, errors: Any, headers: dict[str, str] = JSON) -> Answer:
    body = {"result": {}, "success": False, "errors": errors, "messages": []}
    return Answer(status, headers, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("code", "outcome", "action"),
    [
        (971, Outcome.RATE, Action.WAIT),
        (3003, Outcome.BAD_INPUT, Action.REFUSE),
        (3006, Outcome.TOO_LARGE, Action.REFUSE),
        (3007, Outcome.TIMEOUT, Action.AGAIN),
        (3008, Outcome.ABORTED, Action.AGAIN),
        (3010, Outcome.BAD_INPUT, Action.REFUSE),
        (3021, Outcome.RATE, Action.WAIT),
        (3023, Outcome.DENIED, Action.SWITCH),
        (3030, Outcome.BAD_INPUT, Action.REFUSE),
        (3036, Outcome.DAY_USED_UP, Action.WAIT),
        (3040, Outcome.CAPACITY, Action.WAIT),
        (3041, Outcome.DENIED, Action.SWITCH),
        (3042, Outcome.NO_ROUTE, Action.STOP),
        (3043, Outcome.FAILED, Action.AGAIN),
        (4006, Outcome.DAY_USED_UP, Action.WAIT),
        (5004, Outcome.BAD_INPUT, Action.REFUSE),
        (5006, Outcome.BAD_INPUT, Action.REFUSE),
        (5007, Outcome.NO_ROUTE, Action.STOP),
        (5018, Outcome.DENIED, Action.SWITCH),
        (7000, Outcome.NO_ROUTE, Action.STOP),
        (7003, Outcome.NO_ROUTE, Action.STOP),
        (9106, Outcome.DENIED, Action.SWITCH),
        (9109, Outcome.DENIED, Action.SWITCH),
        (10000, Outcome.DENIED, Action.SWITCH),
        (10405, Outcome.NO_ROUTE, Action.STOP),
    ],
)
@pytest.mark.parametrize("status", [200, 400, 429, 503])
def test_a_known_number_decides_whatever_the_status(code: int, outcome: Outcome, action: Action, status: int) -> None:
    verdict = classify(failure(status, [{"code": code, "message": f"AiError: AiError: x ({UUID})"}]))
    assert verdict == Verdict(outcome, "x")
    assert verdict.outcome.action is action


def test_every_number_of_the_table_is_tested() -> None:
    """Whoever adds one says here what it means."""
    (mark,) = [mark for mark in test_a_known_number_decides_whatever_the_status.pytestmark if "code" in mark.args[0]]
    assert {code: outcome for code, outcome, _ in mark.args[1]} == CODES


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (204, Outcome.NO_PICTURE),
        (302, Outcome.NO_ROUTE),
        (400, Outcome.BAD_INPUT),
        (401, Outcome.DENIED),
        (402, Outcome.DENIED),
        (403, Outcome.DENIED),
        (404, Outcome.NO_ROUTE),
        (405, Outcome.NO_ROUTE),
        (408, Outcome.TIMEOUT),
        (413, Outcome.TOO_LARGE),
        (418, Outcome.NO_ROUTE),
        (422, Outcome.BAD_INPUT),
        (429, Outcome.RATE),
        (500, Outcome.FAILED),
        (502, Outcome.FAILED),
        (524, Outcome.FAILED),
        (600, Outcome.FAILED),
    ],
)
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"null", b"\xff", b'{"errors": []}', b'{"errors": [{}]}', b"[" * 100_000],
    ids=lambda body: repr(body[:20]),
)
def test_without_one_the_status_decides(status: int, outcome: Outcome, body: bytes) -> None:
    """An unknown number is none, too; and no body upsets anybody."""
    assert classify(Answer(status, {}, body)) == Verdict(outcome, f"HTTP status {status}")
    assert classify(failure(status, [{"code": 123456, "message": "x"}])) == Verdict(outcome, "x")


def test_errors_may_be_an_object_and_a_number_text() -> None:
    assert classify(failure(400, {"code": "3040", "message": "x"})).outcome is Outcome.CAPACITY
    assert classify(failure(503, [{"code": "²"}])).outcome is Outcome.FAILED


def test_an_allocation_that_is_used_up_is_known_by_its_words() -> None:
    words = "you have used up your daily free allocation of 10,000 neurons"
    assert classify(failure(429, [{"code": 1, "message": words}])) == Verdict(Outcome.DAY_USED_UP, words)


def test_flagged_output_is_told_from_other_wrong_input() -> None:
    words = "Model input is not valid: output has been flagged"
    assert classify(failure(400, [{"code": 3030, "message": words}])) == Verdict(Outcome.FLAGGED, words)
    assert Outcome.FLAGGED.action is Action.CENSOR


def test_a_picture_may_be_one() -> None:
    """Only decoding shows it; an error that calls itself a success is none."""
    assert classify(Answer(200, PNG, b"\x89PNG")) == Verdict(Outcome.PICTURE)
    assert classify(Answer(200, JSON, b'{"result": {"image": "x"}, "errors": []}')) == Verdict(Outcome.PICTURE)
    assert classify(failure(200, [{"message": "broken"}])) == Verdict(Outcome.FAILED, "broken")


def test_long_words_are_cut() -> None:
    assert len(classify(failure(400, [{"code": 5006, "message": "x" * 10_000}])).words) == 500


def test_a_request_is_known_by_its_id_or_its_ray() -> None:
    assert Answer(200, {"cf-ai-req-id": "a", "cf-ray": "b"}, b"").request_id == "a"
    assert Answer(200, {"cf-ray": "b"}, b"").request_id == "b"
    assert Answer(200, {}, b"").request_id == ""


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
        ("1e12", 86400.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400.0),
    ],
)
def test_how_long_to_wait(value: str, seconds: float) -> None:
    assert retry_after({"retry-after": value}) == seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ('"default";r=0;t=30', 30.0),
        ('"default"; r=0; t=30', 30.0),
        ('"default";r=0;pk=:x:;t=7', 7.0),
        ('"default";r=50;t=30', 0.0),
        ("r=0", 0.0),
        ("", 0.0),
    ],
)
def test_how_long_no_call_is_left(value: str, seconds: float) -> None:
    assert hold_seconds({"ratelimit": value}) == seconds


@pytest.mark.parametrize(("value", "cost"), [("12.5", 12.5), ("0", 0.0), ("-1", None), ("many", None), ("", None)])
def test_what_a_call_cost(value: str, cost: float | None) -> None:
    assert neurons({"cf-ai-neurons": value}) == cost


@pytest.mark.parametrize(
    ("outcome", "cost", "billed"),
    [
        (Outcome.NO_PICTURE, None, True),
        (Outcome.FLAGGED, 12.5, True),
        (Outcome.FLAGGED, 0.0, False),
        (Outcome.FAILED, None, False),
        (Outcome.CAPACITY, None, False),
    ],
)
def test_whether_a_call_without_a_picture_was_billed(outcome: Outcome, cost: float | None, billed: bool) -> None:
    assert Called(Verdict(outcome), neurons=cost).was_billed is billed
