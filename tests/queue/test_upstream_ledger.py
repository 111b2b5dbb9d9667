"""What workers share about an upstream: exact limits, parked and held accounts, and what each day cost."""

import asyncio
import time
from collections import Counter
from datetime import datetime, tzinfo
from typing import Final

import pytest
from arq.connections import ArqRedis

from img2img.upstream import Books, Credential, Pause, Rates, UpstreamLedger
from tests.days import keep_within_a_day

FIRST: Final = Credential("first", "token-of-first")
SECOND: Final = Credential("second", "token-of-second")
PREFIX: Final = "img2img:{0}:"
DAY: Final = 24 * 3600 * 1000
TEST_SECONDS: Final = 5.0


def ledger_of(redis: ArqRedis, account: int = 10, token: int = 100, new_day: float = 0.0) -> UpstreamLedger:
    return UpstreamLedger(redis, Rates(account, 60.0, token, 300.0, new_day=new_day))


async def admitted(ledger: UpstreamLedger, *credentials: Credential, calls: int) -> Counter[str]:
    """Who was let pass when so many asked at once; ``""`` for those that have to wait."""
    answers = await asyncio.gather(*(ledger.admit(credentials) for _ in range(calls)))
    return Counter(answer.account if isinstance(answer, Credential) else "" for answer in answers)


async def waiting(ledger: UpstreamLedger, *credentials: Credential) -> Pause:
    answer = await ledger.admit(credentials)
    assert isinstance(answer, Pause)
    return answer


async def age(redis: ArqRedis, window: str, calls: int, milliseconds: int) -> None:
    """Make the oldest calls of a window that much older, as if time had passed for them."""
    key = f"{PREFIX}upstream-calls:{window}"
    for index, at in enumerate(await redis.lrange(key, 0, calls - 1)):
        await redis.lset(key, index, str(int(at) - milliseconds))


@pytest.mark.parametrize(("account", "token", "passed"), [(10, 100, 10), (100, 7, 7)])
async def test_exactly_as_many_calls_pass_as_may(redis: ArqRedis, account: int, token: int, passed: int) -> None:
    """Of the narrower of the two windows, however many workers ask at once."""
    one, other = ledger_of(redis, account, token), ledger_of(redis, account, token)
    let = await asyncio.gather(admitted(one, FIRST, calls=50), admitted(other, FIRST, calls=50))
    assert sum(counts["first"] for counts in let) == passed


async def test_who_has_to_wait_is_told_for_how_long(redis: ArqRedis) -> None:
    """Until the oldest call has left its window: a minute for the account's, five for the token's, and a second."""
    ledger = ledger_of(redis, account=1)
    await admitted(ledger, FIRST, calls=1)
    pause = await waiting(ledger, FIRST)
    assert pause.why == "limited"
    assert 50 < pause.seconds <= 61
    narrow = ledger_of(redis, account=100, token=1)
    assert 290 < (await waiting(narrow, FIRST)).seconds <= 301


async def test_the_window_slides(redis: ArqRedis) -> None:
    """For each call that has left it one more may go; nothing comes back all at once."""
    ledger = ledger_of(redis)
    await admitted(ledger, FIRST, calls=10)
    await age(redis, "first", 3, 60_000)
    assert await admitted(ledger, FIRST, calls=20) == {"first": 3, "": 17}
    await age(redis, "first", 2, 10_000)
    assert 40 < (await waiting(ledger, FIRST)).seconds <= 50


async def test_a_call_that_must_wait_counts_for_nothing(redis: ArqRedis) -> None:
    """Asking is free: neither window grows."""
    ledger = ledger_of(redis, account=2)
    await admitted(ledger, FIRST, calls=30)
    assert await redis.llen(f"{PREFIX}upstream-calls:first") == 2
    assert await redis.llen(f"{PREFIX}upstream-calls:token:token-of-first") == 2


async def test_a_lower_limit_counts_at_once(redis: ArqRedis) -> None:
    """After a restart with another setting."""
    await admitted(ledger_of(redis), FIRST, calls=10)
    await age(redis, "first", 6, 60_000)
    assert await admitted(ledger_of(redis, account=5), FIRST, calls=5) == {"first": 1, "": 4}


async def test_who_only_asks_takes_nothing(redis: ArqRedis) -> None:
    ledger = ledger_of(redis, account=1)
    assert [await ledger.pause([FIRST]) for _ in range(3)] == [None, None, None]
    assert await ledger.accounts() == []
    assert await admitted(ledger, FIRST, calls=1) == {"first": 1}
    pause = await ledger.pause([FIRST])
    assert pause is not None
    assert pause.why == "limited"
    assert await ledger.pause([FIRST, SECOND]) is None


async def test_the_account_with_most_room_makes_the_call(redis: ArqRedis) -> None:
    """Until all are full, they share evenly; one that was used before has less left."""
    ledger = ledger_of(redis)
    await admitted(ledger, FIRST, calls=4)
    assert await admitted(ledger, FIRST, SECOND, calls=16) == {"first": 6, "second": 10}
    assert (await waiting(ledger, FIRST, SECOND)).why == "limited"


async def test_two_tokens_of_an_account_share_its_window(redis: ArqRedis) -> None:
    ledger = ledger_of(redis)
    assert await admitted(ledger, FIRST, Credential("first", "another"), calls=20) == {"first": 10, "": 10}


async def test_an_account_is_parked_until_midnight(redis: ArqRedis) -> None:
    """00:00 UTC by the server's clock, for all workers and all of its tokens; others go on."""
    keep_within_a_day(TEST_SECONDS)
    one, other = ledger_of(redis), ledger_of(redis)
    await one.settle(FIRST, parked=True)
    seconds, _ = await redis.time()
    ends: int = await redis.pexpiretime(f"{PREFIX}upstream-parked:first")
    assert ends == (seconds * 1000 // DAY + 1) * DAY
    assert await admitted(other, FIRST, SECOND, calls=3) == {"second": 3}
    pause = await waiting(other, FIRST, Credential("first", "another"))
    assert pause.why == "parked"
    assert abs(pause.seconds - (ends / 1000 - seconds)) < 2


async def test_on_a_new_day_an_account_is_parked_for_a_minute(redis: ArqRedis) -> None:
    """The call may have been made on the day before, and that day be the one that is used up."""
    ledger = ledger_of(redis, new_day=DAY / 1000)
    await ledger.settle(FIRST, parked=True)
    pause = await waiting(ledger, FIRST)
    assert pause.why == "parked"
    assert pause.seconds <= 60


async def test_a_held_credential_rests(redis: ArqRedis) -> None:
    """The longest word counts, and it is about that token only."""
    ledger = ledger_of(redis)
    await ledger.settle(FIRST, held=30.0)
    await ledger.settle(FIRST, held=5.0)
    pause = await waiting(ledger, FIRST)
    assert pause.why == "held"
    assert 25 < pause.seconds <= 30
    assert await admitted(ledger, FIRST, Credential("first", "another"), calls=2) == {"first": 2}


async def test_who_waits_for_several_waits_for_the_first(redis: ArqRedis) -> None:
    keep_within_a_day(TEST_SECONDS)
    ledger = ledger_of(redis, account=1)
    await ledger.settle(FIRST, parked=True)
    await admitted(ledger, SECOND, calls=1)
    pause = await waiting(ledger, FIRST, SECOND)
    assert pause.why in ("limited", "parked")  # within a minute of midnight the parked one is the first
    assert pause.seconds <= 60


async def test_the_books_say_what_a_day_cost(redis: ArqRedis) -> None:
    """Calls as they are made, pictures and neurons as they come."""
    keep_within_a_day(TEST_SECONDS)
    ledger = ledger_of(redis)
    await admitted(ledger, FIRST, SECOND, calls=5)
    for _ in range(2):
        await ledger.settle(FIRST, pictures=1, neurons=12.25)
    await ledger.settle(SECOND, parked=True)
    assert await ledger.accounts() == ["first", "second"]
    first, second = [await ledger.books(account) for account in await ledger.accounts()]
    assert [(day.calls, day.pictures, day.neurons) for day in first.days] == [(3, 2, 24.5)]
    assert [(day.calls, day.pictures, day.neurons) for day in second.days] == [(2, 0, 0.0)]
    assert first.parked_seconds == 0 < second.parked_seconds
    assert await ledger.books("third") == Books("third", 0.0, ())


async def test_the_servers_clock_says_what_day_it_is(redis: ArqRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the books elsewhere, where it is another day, finds the same in them."""

    class Elsewhere(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Elsewhere":
            return cls.fromtimestamp(time.time() - 9 * DAY / 1000, tz)

    keep_within_a_day(TEST_SECONDS)
    ledger = ledger_of(redis)
    await admitted(ledger, FIRST, calls=1)
    here = await ledger.books("first")
    monkeypatch.setattr("img2img.upstream.datetime", Elsewhere)
    assert await ledger.books("first") == here
    assert [day.calls for day in here.days] == [1]
