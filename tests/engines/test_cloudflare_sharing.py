"""Engines that share accounts and limits of Cloudflare's API: who calls, and who waits."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from arq.connections import ArqRedis
from click.testing import CliRunner
from upstream_helpers import ACME, OTHER, REFUSED_TOKEN, called, failure_of, opened, outputs_of, task_of, words

from img2img.cli import main
from img2img.errors import UpstreamBusy, UpstreamRefused
from img2img.upstream import Rates, open_ledger
from tests.days import DAY, PATIENCE, keep_within_a_day
from tests.upstream.api import Api
from tests.upstream.server import Upstream
from worker.engines.base import Image
from worker.engines.cloudflare import CloudflareEngine


class TestAccounts:
    @pytest.fixture
    async def both(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> AsyncIterator[CloudflareEngine]:
        async with opened(valkey_url, upstream.url, ACME, OTHER) as engine:
            yield engine

    async def test_they_take_turns(self, both: CloudflareEngine, api: Api) -> None:
        for _ in range(4):
            await outputs_of(both, task_of())
        assert [call.account for call in api.calls] == ["acme", "other", "acme", "other"]

    async def test_one_that_is_not_let_in_leaves_the_jobs_to_another(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        async with opened(valkey_url, upstream.url, REFUSED_TOKEN, OTHER) as engine:
            for _ in range(3):
                assert isinstance((await outputs_of(engine, task_of()))[-1], Image)
        async with opened(valkey_url, upstream.url, REFUSED_TOKEN, OTHER) as another:
            await outputs_of(another, task_of())
        assert [(call.account, call.code) for call in api.calls] == [("acme", 10000)] + 4 * [("other", None)]

    async def test_while_none_is_let_in_jobs_wait(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        """But for the one that has found out: its caller is told what is wrong."""
        async with opened(valkey_url, upstream.url, REFUSED_TOKEN) as engine:
            errors = [(await failure_of(engine, task_of()))[0] for _ in range(3)]
        assert [type(error) for error in errors] == [UpstreamRefused, UpstreamBusy, UpstreamBusy]
        assert all("check ids and tokens" in str(error) for error in errors)
        assert len(api.calls) == 1

    async def test_a_call_that_a_firewall_stops_holds_up_no_other(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        """It stops a call for what is in it, and answers with a page of its own."""
        async with opened(valkey_url, upstream.url, ACME) as engine:
            error, _ = await failure_of(engine, task_of("html:403"))
            assert isinstance(error, UpstreamRefused)
            assert isinstance((await outputs_of(engine, task_of()))[-1], Image)

    async def test_one_whose_day_is_used_up_is_left_alone(self, both: CloudflareEngine, api: Api) -> None:
        """By this job and all that follow, until midnight."""
        keep_within_a_day(PATIENCE)
        api.script.order("3036", account="acme")
        for _ in range(3):
            await outputs_of(both, task_of())
        assert [call.account for call in api.calls].count("acme") == 1

    async def test_when_all_days_are_used_up_the_job_is_told_until_when(
        self, both: CloudflareEngine, api: Api, redis: ArqRedis
    ) -> None:
        keep_within_a_day(PATIENCE)
        api.script.order("3036", "3036")
        error, _ = await failure_of(both, task_of())
        assert isinstance(error, UpstreamBusy)
        seconds, _ = await redis.time()
        assert 0 < error.retry_after <= DAY + 5
        assert (seconds + error.retry_after + 2) % DAY < 10  # the server's seconds are whole ones
        assert "until 00:00 UTC" in str(error)
        await failure_of(both, task_of())
        assert len(api.calls) == 2


class TestLimits:
    async def test_no_more_calls_than_may_are_made(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        """Of two workers together; the others are told to come back, and have called nobody."""
        rates = Rates(account_calls=3)
        async with (
            opened(valkey_url, upstream.url, rates=rates) as one,
            opened(valkey_url, upstream.url, rates=rates) as other,
        ):
            results = await asyncio.gather(
                *(outputs_of(engine, task_of()) for engine in (one, other) for _ in range(5)), return_exceptions=True
            )
        assert len(api.calls) == 3
        assert sum(isinstance(result, UpstreamBusy) for result in results) == 7

    async def test_a_short_wait_is_waited_for_here(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        rates = Rates(account_calls=2, account_window=0.2)
        async with opened(valkey_url, upstream.url, rates=rates) as engine:
            found = await asyncio.gather(*(outputs_of(engine, task_of()) for _ in range(6)))
        assert [words(outputs) for outputs in found] == [["Sent", "Image"]] * 6

    async def test_a_wait_beyond_the_deadline_is_told_at_once(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        async with opened(valkey_url, upstream.url, rates=Rates(account_calls=1)) as engine:
            await outputs_of(engine, task_of())
            error, outputs = await failure_of(engine, task_of(deadline=time.monotonic() + 20))
        assert isinstance(error, UpstreamBusy)
        assert error.retry_after > 20
        assert words(outputs) == []

    @pytest.mark.parametrize("behaviour", ["throttled:45=1", "throttled:45"])
    async def test_a_token_that_is_to_rest_rests_for_all(
        self, engine: CloudflareEngine, valkey_url: str, upstream: Upstream, api: Api, behaviour: str
    ) -> None:
        error, _ = await failure_of(engine, task_of(behaviour))
        assert isinstance(error, UpstreamBusy)
        assert 40 < error.retry_after <= 50
        async with opened(valkey_url, upstream.url) as other:
            await failure_of(other, task_of())
        assert len(api.calls) == 1

    async def test_no_more_calls_at_once_than_may_be(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        async with opened(valkey_url, upstream.url, highest=3) as engine, httpx.AsyncClient(trust_env=False) as http:
            working = asyncio.gather(*(outputs_of(engine, task_of("hold", seed=seed)) for seed in range(9)))
            await called(api, 3)
            await http.post(upstream.url.replace("client/v4", "control/release"))
            await working
        assert len(api.calls) == 9
        assert api.most_open == 3

    async def test_while_the_upstream_fails_the_others_wait(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The breaker opened: jobs are told to come back, and nobody calls."""
        async with opened(valkey_url, upstream.url, breaker=2, max_calls=2) as engine:
            await failure_of(engine, task_of("html:502"))
            monkeypatch.setattr("worker.engines.cloudflare.engine.PATIENCE", 0.1)
            error, outputs = await failure_of(engine, task_of())
        assert isinstance(error, UpstreamBusy)
        assert "fails call after call" in str(error)
        assert words(outputs) == []
        assert len(api.calls) == 2


async def test_what_is_spent_is_in_the_books(engine: CloudflareEngine, valkey_url: str, redis: ArqRedis) -> None:
    keep_within_a_day(PATIENCE)
    await outputs_of(engine, task_of("3040=1"))
    async with open_ledger(valkey_url, Rates()) as ledger:
        (day,) = (await ledger.books("acme")).days
    assert (day.calls, day.pictures, day.neurons) == (2, 1, 12.5)


async def test_the_books_can_be_read_on_a_terminal(engine: CloudflareEngine, valkey_url: str) -> None:
    keep_within_a_day(PATIENCE)
    await outputs_of(engine, task_of())
    await failure_of(engine, task_of("4006"))
    shown = await asyncio.to_thread(_upstream_command, valkey_url)
    (books,) = [
        json.loads(line) for line in (await asyncio.to_thread(_upstream_command, valkey_url, "--json")).splitlines()
    ]
    assert re.match(r"acme, parked for \d+ (?:h|min|s)\n  \d{4}-\d\d-\d\d +2 calls +1 pictures +12\.5 neurons\n", shown)
    assert (books["account"], books["days"][0]["calls"], books["days"][0]["neurons"]) == ("acme", 2, 12.5)


def _upstream_command(redis_url: str, *options: str) -> str:
    result = CliRunner().invoke(main, ["upstream", "--redis-url", redis_url, *options])
    assert result.exit_code == 0, result.output
    return result.output
