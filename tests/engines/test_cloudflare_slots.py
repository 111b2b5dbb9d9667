"""How many jobs the engine that calls Cloudflare's API makes use of: as many as the upstream takes now."""

import pytest
from arq.connections import ArqRedis
from structlog.testing import capture_logs
from upstream_helpers import ACME, OTHER, failure_of, opened, outputs_of, task_of

from img2img.upstream import Rates
from tests.days import PATIENCE, keep_within_a_day
from tests.upstream.api import Api
from tests.upstream.server import Upstream
from worker.engines.cloudflare import CloudflareEngine
from worker.engines.cloudflare.gate import FIRST_LIMIT, READY_JOBS

USUAL = FIRST_LIMIT + READY_JOBS


async def test_as_many_as_calls_and_a_few_that_are_ready(engine: CloudflareEngine) -> None:
    """Of which the operator may allow fewer, but not more."""
    assert (engine.slots(0), engine.slots(3), engine.slots(1000)) == (USUAL, 3, USUAL)


async def test_no_more_than_calls_may_be(valkey_url: str, upstream: Upstream) -> None:
    async with opened(valkey_url, upstream.url, highest=3) as engine:
        assert engine.slots(0) == 3 + READY_JOBS


async def test_fewer_when_the_upstream_is_overloaded(engine: CloudflareEngine) -> None:
    await outputs_of(engine, task_of("3040=1"))
    assert engine.slots(0) == 5 + READY_JOBS


@pytest.mark.parametrize("behaviour", ["html:502", "5007", "10000"])
async def test_none_while_it_fails(
    valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis, behaviour: str
) -> None:
    """Or takes no call of ours, so that jobs do not fail here one after the other. A setting does not change that."""
    async with opened(valkey_url, upstream.url, breaker=1, max_calls=1) as engine:
        await failure_of(engine, task_of(behaviour))
        assert (engine.slots(0), engine.slots(3)) == (0, 0)


@pytest.mark.parametrize("behaviour", ["3036", "throttled:45"])
async def test_none_when_no_account_may_call_for_long(engine: CloudflareEngine, behaviour: str) -> None:
    """Its day is used up, or it is to rest."""
    keep_within_a_day(PATIENCE)
    await failure_of(engine, task_of(behaviour))
    assert engine.slots(0) == 0


@pytest.mark.parametrize("behaviour", ["3036", "throttled:45"])
async def test_none_from_the_start_when_no_account_may_call(
    valkey_url: str, upstream: Upstream, engine: CloudflareEngine, behaviour: str
) -> None:
    """A worker that starts then claims nothing: others have found out already."""
    keep_within_a_day(PATIENCE)
    await failure_of(engine, task_of(behaviour))
    with capture_logs() as logs:
        async with opened(valkey_url, upstream.url) as second, opened(valkey_url, upstream.url, ACME, OTHER) as third:
            assert (second.slots(0), third.slots(0)) == (0, USUAL)
    assert [line["event"] for line in logs].count("upstream_paused") == 1


async def test_none_when_a_window_is_full(valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis) -> None:
    """As soon as that is known: when one more job asks."""
    async with opened(valkey_url, upstream.url, rates=Rates(account_calls=1)) as engine:
        await outputs_of(engine, task_of())
        assert engine.slots(0) == USUAL
        await failure_of(engine, task_of())
        assert engine.slots(0) == 0


async def test_all_while_another_account_may_call(
    valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
) -> None:
    """Of those that are used up, or are not let in."""
    keep_within_a_day(PATIENCE)
    async with opened(valkey_url, upstream.url, ACME, OTHER) as engine:
        api.script.order("3036", account="acme")
        for _ in range(2):
            await outputs_of(engine, task_of())
        assert engine.slots(0) == USUAL
        api.script.order("10000", account="other")
        for _ in range(2):
            await failure_of(engine, task_of())
        assert engine.slots(0) == 0
    assert [call.account for call in api.calls] == ["acme", "other", "other", "other"]


async def test_all_when_a_wait_is_over(valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis) -> None:
    """Whoever follows the slots hears of it, without a job that ends."""
    async with opened(valkey_url, upstream.url, breaker=1, max_calls=1) as engine:
        await failure_of(engine, task_of("html:502=1"))
        while (told := engine.slots(0)) == 0:
            await engine.slots_changed(told)
        assert engine.slots(0) == 1
        await outputs_of(engine, task_of("html:502=1"))
        assert engine.slots(0) == USUAL
