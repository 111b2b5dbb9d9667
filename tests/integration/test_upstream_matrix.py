"""What becomes of a job, for each way in which an upstream can answer.

Real engine, runner and queue against the stand-in of Cloudflare's API. All rows run at once, each with an account and
an engine of its own, so that none opens another's breaker or fills its limits; one attempt each, of up to three calls.
"""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from img2img.jobs import JobState, Outcome
from img2img.queue_types import Claim
from img2img.settings import Settings
from img2img.upstream import Rates, open_ledger
from img2img.wiring import Parts, open_parts
from tests.days import keep_within_a_day
from tests.queue.calls import claim_one, submit
from tests.upstream.api import Api
from tests.upstream.calls import Call
from tests.upstream.running import running_upstream
from worker.attempt import StageClock
from worker.main import choose_engine
from worker.runner import Decision, JobRunner, Release, Stop

MAX_CALLS: Final = 3
LONG: Final = 3 * 24 * 3600.0
SHORT: Final = 3.0
"""Rows with this deadline run alone, so that the others do not use it up."""
LEASE: Final = 120.0
DAY_SECONDS: Final = 100.0
"""More than a row's deadline of a minute: a day must not end before it."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """``answers`` are the orders for the row's account, or for each of several; ``seconds`` are until its deadline."""

    answers: tuple[tuple[str, ...], ...]
    state: str
    code: str | None
    calls: int
    parked: int = 0
    seconds: float = LONG
    settings: dict[str, str] = {}
    options: dict[str, Any] = {}


class Seen(msgspec.Struct, frozen=True):
    """What became of a row's job: ``state`` is as in ``Row``, ``parked`` counts accounts, ``pixels`` is a digest."""

    state: str
    code: str | None
    calls: list[Call]
    parked: int
    pixels: str | None


def picture(*answers: str, calls: int = 1, parked: int = 0, **more: Any) -> Row:
    """The job gets its picture."""
    return Row(answers=(answers,), state="succeeded", code=None, calls=calls, parked=parked, **more)


def again(*answers: str, calls: int = MAX_CALLS, **more: Any) -> Row:
    """The attempt has failed, and another one may work."""
    return Row(answers=(answers,), state="failed attempt", code="upstream_failed", calls=calls, **more)


def later(*answers: str, calls: int = MAX_CALLS, parked: int = 0, **more: Any) -> Row:
    """The job waits in the queue, and has lost no attempt."""
    return Row(answers=(answers,), state="waiting", code="upstream_busy", calls=calls, parked=parked, **more)


def over(code: str, *answers: str, calls: int = 1, parked: int = 0, **more: Any) -> Row:
    """The job has failed for good."""
    return Row(answers=(answers,), state="failed", code=code, calls=calls, parked=parked, **more)


def accounts(row: Row, *answers: tuple[str, ...]) -> Row:
    """The row with an account for each of ``answers``."""
    return msgspec.structs.replace(row, answers=answers)


FAIL: Final = {"upstream_on_lost": "fail"}
PLAIN: Final = (
    "slow:0.2", "trickle:0.3", "chunked", "gzip", "webp", "rgba", "unlabelled", "json", "json-bare", "json-data-url",
    "closing", "closing-unsaid", "old-http", "free",
)  # fmt: skip
"""Ways to send the same pixels."""
NO_PICTURES: Final = (
    "empty", "garbage", "truncated", "damaged", "size:64", "bomb", "text", "json-empty", "json-garbage",
    "json-cut", "json-list", "json-null", "no-content", "huge:48", "gzip-bomb", "too-short",
)  # fmt: skip
LOST: Final = (
    "close", "reset", "reset-body", "cut", "cut-chunked", "cut-head", "too-long", "no-http", "huge-head"
)  # fmt: skip
ROWS: Final[dict[str, Row]] = {
    # Pictures
    **{name: picture(name) for name in ("ok", "jpeg", "palette", "grey", "deep", "animated", *PLAIN)},
    # Good answers without one: billed already, so that calling again at once would be billed again.
    **{name: again(name, calls=1) for name in NO_PICTURES},
    # Errors that pass
    **{
        name: again(name)
        for name in ("3007", "3008", "3043", "no-errors", "html:502", "html:520", "plain:503", "blank:500")
    },
    **{f"{name}, once": picture(f"{name}=1", calls=2) for name in ("3007", "html:502", "blank:500", *LOST)},
    **{name: again(name) for name in LOST},
    # Too much, for the moment
    **{name: later(name) for name in ("3040", "3040-object", "3021", "971", "html:429", "unsuccessful")},
    "3040, twice": picture("3040=2", calls=3),
    "3021, once": picture("3021=1", calls=2),
    "told to pause for a second, once": picture("throttled:1=1", calls=2),
    "told to pause for an hour": later("throttled:3600", calls=1),
    "told to pause beyond the deadline": over("upstream_busy", "throttled:3600", seconds=60.0),
    # The account's day is used up
    **{name: later(name, calls=1, parked=1) for name in ("3036", "4006", "allocation")},
    "3036, and a deadline before midnight": over("upstream_busy", "3036", parked=1, seconds=60.0),
    "3036 on one of two accounts": accounts(picture(calls=2, parked=1), ("3036",), ("3036=0",)),
    "3036 on both accounts": accounts(later(calls=2, parked=2), ("3036",), ("3036",)),
    # This input will not do
    **{
        name: over("model_refused", name)
        for name in ("3003", "3006", "3010", "3030", "5004", "5006", "uncoded", "blank:413", "blank:422")
    },
    "flagged": over("unsafe_output", "flagged"),
    # This account, or this address, will not do
    **{
        name: over("upstream_refused", name)
        for name in ("3023", "3041", "5018", "9106", "10000", "html:403", "blank:402")
    },
    **{
        name: over("upstream_refused", name)
        for name in ("3042", "5007", "7000", "7003", "10405", "redirect", "blank:404", "blank:405")
    },
    "10000 on one of two accounts": accounts(picture(calls=2), ("10000",), ("3040=0",)),
    "5018 on both accounts": accounts(over("upstream_refused", calls=2), ("5018",), ("5018",)),
    # Silence
    **{
        name: Row(answers=((name,),), state="expired", code="expired", calls=1, seconds=SHORT)
        for name in ("never", "stall")
    },
    # A lost answer that must not be paid for twice
    **{f"{name}, not to be repeated": over("upstream_unknown", name, settings=FAIL) for name in LOST},
    "3040, when lost answers end the job": later("3040", settings=FAIL),
    "502, when lost answers end the job": again("html:502", settings=FAIL),
    "3007, once, when lost answers end the job": picture("3007=1", calls=2, settings=FAIL),
    # What no call can ask for
    "previews": over("model_refused", "ok", calls=0, options={"previews": True}),
    "reproducible": over("model_refused", "ok", calls=0, options={"reproducible": True}),
    # Nobody there
    "nobody listens": again("ok", calls=0, settings={"upstream_url": "http://127.0.0.1:9/client/v4"}),
    "nobody listens, and lost answers end the job": again(
        "ok", calls=0, settings={"upstream_url": "http://127.0.0.1:9/client/v4", **FAIL}
    ),
}


async def run_row(parts: Parts, api: Api, claim: Claim, settings: Settings, accounts: Sequence[str]) -> Seen:
    """One attempt at the row's job, written as the worker writes it."""
    engine = choose_engine(settings)
    async with engine:
        runner = JobRunner(parts.queue, parts.blobs, engine, settings, "w1")
        decision = await runner.run(claim, Stop(), StageClock(0.0))
    state, code = await write(parts, claim, decision)
    result = (await parts.queue.get(claim.id)).outcome
    receipt = result.result.receipt if result is not None and result.result is not None else None
    async with open_ledger(settings.redis_url, Rates()) as ledger:
        parked = sum([(await ledger.books(account)).parked_seconds > 0 for account in accounts])
    calls = [call for call in api.calls if call.account in accounts]
    return Seen(state, code, calls, parked, receipt and receipt.pixels_sha256)


async def write(parts: Parts, claim: Claim, decision: Decision) -> tuple[str, str | None]:
    """End the job or give it back; the job's state afterwards, and why it is in it."""
    if isinstance(decision, Outcome):
        await parts.queue.finish(claim, decision)
        return decision.state.value, decision.error and decision.error.code
    assert isinstance(decision, Release)
    await parts.queue.release(claim, decision.why, decision.kind, delay=decision.delay)
    job = await parts.queue.get(claim.id)
    if job.outcome is not None:  # a call that ends with its deadline leaves it to the queue to say so
        return job.state.value, job.outcome.error and job.outcome.error.code
    assert job.state == JobState.QUEUED
    assert (job.failures, job.interruptions) in ((1, 0), (0, 1))
    return "failed attempt" if job.failures else "waiting", decision.why.code


async def run_all(api: Api, url: str, redis_url: str, folder: Path) -> dict[str, Seen]:
    """Every row's job. Those with a short deadline come first, when no other waits that a claim could bring instead."""
    async with open_parts(Settings(redis_url=redis_url)) as parts:
        seen: dict[str, Seen] = {}
        for short in (True, False):
            running = {}
            for number, (name, row) in enumerate(ROWS.items()):
                if (row.seconds == SHORT) is short:
                    accounts = [f"row{number}-{place}" for place in range(len(row.answers))]
                    for account, orders in zip(accounts, row.answers, strict=True):
                        api.script.order(*orders, account=account)
                    settings = settings_of(row, accounts, url, redis_url, folder / f"{number}.toml")
                    running[name] = run_row(parts, api, await claimed(parts, row), settings, accounts)
            seen |= zip(running, await asyncio.gather(*running.values()), strict=True)
        return seen


def settings_of(row: Row, accounts: Sequence[str], url: str, redis_url: str, file: Path) -> Settings:
    """Those of a worker for this row alone; ``file`` is made, and has a token for each of ``accounts``."""
    file.write_text("".join(f'[[accounts]]\nid = "{account}"\ntoken = "of-{account}"\n' for account in accounts))
    return Settings.from_environment(
        {},
        engine="cloudflare",
        redis_url=redis_url,
        upstream_accounts_file=str(file),
        upstream_max_calls=str(MAX_CALLS),
        upstream_breaker="1000",
        **{"upstream_url": url, **row.settings},
    )


async def claimed(parts: Parts, row: Row) -> Claim:
    await submit(parts.queue, seconds=row.seconds, options=row.options, fields={"width": 256, "height": 256})
    return await claim_one(parts.queue, lease=LEASE)


@pytest.fixture(scope="module")
def seen(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Seen]]:
    keep_within_a_day(DAY_SECONDS)
    api = Api()
    with running_upstream(api) as upstream:
        api.limit(10**6, 60.0, 10**6, 300.0)
        yield asyncio.run(run_all(api, upstream.url, valkey_url, tmp_path_factory.mktemp("accounts")))


@pytest.mark.parametrize("name", ROWS)
def test_what_becomes_of_the_job(seen: dict[str, Seen], name: str) -> None:
    """State, reason, calls that were made, and accounts that are left alone until midnight."""
    row, got = ROWS[name], seen[name]
    assert (got.state, got.code, len(got.calls), got.parked) == (row.state, row.code, row.calls, row.parked)


@pytest.mark.parametrize("name", PLAIN)
def test_however_it_is_sent_the_picture_is_the_same(seen: dict[str, Seen], name: str) -> None:
    """Pixel for pixel."""
    assert seen[name].pixels == seen["ok"].pixels


@pytest.mark.parametrize("name", ["never", "stall"])
def test_a_call_that_is_given_up_is_closed(seen: dict[str, Seen], name: str) -> None:
    """The upstream sees that nobody waits for its answer."""
    assert [call.ended for call in seen[name].calls] == ["gone"]
