"""The tree of errors: its codes, its picture, the front ends' tables and docs/errors.md stay in step."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from litestar.testing import RequestFactory

from gateway.rest import envelope, problems
from gateway.rpc import errors as rpc
from img2img import errors
from img2img.errors import Img2ImgError, InvalidRequest, JobError, JobNotFound, Retryable, error_of, most_specific
from img2img.records import read_refusal

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"
LINE = re.compile(r"^ {4}(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+) +(?P<code>[a-z_]+|-)(?: |$)", re.MULTILINE)
TABLES: dict[str, dict[type[Img2ImgError], Any]] = {
    "native": problems.STATUS,
    "cloudflare": envelope.ERRORS,
    "grpc": rpc.STATUS,
}
SERVER_FAULTS = {"internal", "configuration", "lease_lost"}
"""Only these may be answered by a table's entry for the root: no caller can do anything about them."""


class Row(NamedTuple):
    """A class of the tree as its picture shows it."""

    depth: int
    name: str
    code: str


def walk(kind: type[Img2ImgError] = Img2ImgError, depth: int = 0) -> Iterator[tuple[int, type[Img2ImgError]]]:
    """Every class of the kernel's tree; classes that a process adds for itself never leave it."""
    yield depth, kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from walk(child, depth + 1)


KINDS = [kind for _, kind in walk()]
REPORTED = [kind for kind in KINDS if "code" in vars(kind)]


def test_every_code_belongs_to_one_class() -> None:
    """A program that matches on a code means one kind of error."""
    counted = Counter(kind.code for kind in REPORTED)
    assert [code for code, count in counted.items() if count > 1] == []
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", code) for code in counted)


def test_only_a_base_has_no_code_of_its_own() -> None:
    """What can be raised has a code; these two are only ever raised as one of their kinds."""
    assert [kind.__name__ for kind in KINDS if "code" not in vars(kind)] == ["Retryable", "Congested"]


def test_the_picture_of_the_tree_is_the_tree() -> None:
    """The drawing at the top of errors.py has every class under its base, with its code."""
    drawn = [Row(len(line["indent"]) // 4, line["name"], line["code"]) for line in LINE.finditer(errors.__doc__ or "")]
    real = [Row(depth, kind.__name__, vars(kind).get("code", "-")) for depth, kind in walk()]
    assert sorted(drawn) == sorted(real)
    assert _parents(drawn) == {kind.__name__: kind.__base__.__name__ for kind in KINDS[1:]}


def _parents(rows: list[Row]) -> dict[str, str]:
    above: list[str] = []
    parents = {}
    for row in rows:
        del above[row.depth :]
        if above:
            parents[row.name] = above[-1]
        above.append(row.name)
    return parents


@pytest.mark.parametrize("front_end", TABLES)
@pytest.mark.parametrize("kind", REPORTED, ids=lambda kind: kind.__name__)
def test_every_front_end_has_an_answer_to_every_error(front_end: str, kind: type[Img2ImgError]) -> None:
    """Nothing a caller can act on falls through to the entry for what nobody expected."""
    table = TABLES[front_end]
    answered_by = next(base for base in kind.__mro__ if base in table)
    if answered_by is Img2ImgError:
        assert kind.code in SERVER_FAULTS or issubclass(kind, JobError)


@pytest.mark.parametrize("kind", REPORTED, ids=lambda kind: kind.__name__)
def test_a_recorded_code_becomes_its_error_again(kind: type[Img2ImgError]) -> None:
    """A job that failed with a code is reported as that error by each front end, message and all."""
    error = error_of(kind.code, "what was recorded")
    assert type(error) is kind
    assert str(error) == "what was recorded"
    request = RequestFactory().post("/client/v4/accounts/a/ai/run/m")
    native, cloudflare = problems.problem(error), envelope.failure(request, error)
    assert json.loads(native.content)["code"] == kind.code
    assert json.loads(cloudflare.content)["success"] is False
    assert native.headers["img2img-error"] == cloudflare.headers["img2img-error"] == kind.code
    assert native.status_code >= 400
    assert cloudflare.status_code >= 400
    assert rpc.to_status(error).message == "what was recorded"


def test_an_unknown_code_is_a_failed_job() -> None:
    """A newer worker's code still comes out as an error of a job."""
    assert type(error_of("from_the_future", "x")) is JobError


def test_an_error_names_what_is_wrong() -> None:
    """Errors about something carry its name, for programs and for people."""
    assert InvalidRequest("width", "too wide").field == "width"
    assert "0-1" in str(JobNotFound("0-1"))
    assert Retryable("later", retry_after=3.0).retry_after == 3.0


def test_what_no_pool_can_do_names_its_field() -> None:
    """As any wrong field is named, but with a code of its own, since another service might take it."""
    error = errors.Unsupported("num_steps", "no pool takes more than 8 steps: ask for fewer")
    body = json.loads(problems.problem(error).content)
    assert (body["status"], body["code"], body["field"]) == (400, "unsupported", "num_steps")
    violation = details(error)[error_details_pb2.BadRequest].field_violations[0]
    assert (violation.field, violation.description) == ("num_steps", error.reason)


def test_a_spent_day_says_when_it_is_over() -> None:
    """Over HTTP and gRPC; Cloudflare's SDKs are told to leave it at that."""
    error = read_refusal("spend", 3600.5, 12.0)
    assert type(error) is errors.SpendCapReached
    assert "00:00 UTC" in str(error)
    native = problems.problem(error)
    cloudflare = envelope.failure(RequestFactory().post("/client/v4/accounts/a/ai/run/m"), error)
    assert native.headers["retry-after"] == cloudflare.headers["retry-after"] == "3601"
    assert "eta_seconds" not in json.loads(native.content)
    assert cloudflare.headers["x-should-retry"] == "false"
    found = details(error)
    assert found[error_details_pb2.RetryInfo].retry_delay.ToMilliseconds() == 3_600_500
    assert found[error_details_pb2.QuotaFailure].violations[0].subject == "spend of the day"


def details(error: Img2ImgError) -> dict[type[Message], Any]:
    """What gRPC's answer to the error carries beside ``ErrorInfo``, by its type."""
    kinds = (error_details_pb2.BadRequest, error_details_pb2.RetryInfo, error_details_pb2.QuotaFailure)
    found = {}
    for packed in rpc.to_status(error).details:
        for kind in kinds:
            message = kind()
            if packed.Unpack(message):
                found[kind] = message
    return found


def _documented() -> dict[str, tuple[str, str, str]]:
    """Code to (native HTTP status, Cloudflare's code and status, gRPC status), as docs/errors.md has them."""
    rows = re.findall(
        r"^\| `([a-z_]+)` \|[^|]*\| (\d+) \| (\d+ / \d+) \| ([A-Z_]+) \|[^|]+\|$", DOCUMENT.read_text(), re.M
    )
    return {code: (native, cloudflare, grpc) for code, native, cloudflare, grpc in rows}


def test_the_document_has_every_code_with_its_answers() -> None:
    """docs/errors.md and the tables say the same of every code."""
    expected = {}
    for kind in REPORTED:
        dialect = most_specific(envelope.ERRORS, kind)
        native, status = most_specific(problems.STATUS, kind), most_specific(rpc.STATUS, kind)
        expected[kind.code] = (str(native), f"{dialect.code} / {dialect.status}", status.name)
    assert _documented() == expected
