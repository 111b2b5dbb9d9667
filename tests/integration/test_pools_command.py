"""``img2img pools``: what is read from the queue's server, and how it is shown."""

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from img2img.cli import main
from img2img.queue import JobQueue
from img2img.queue_types import WorkerInfo
from img2img.server import open_redis
from img2img.spending import ALL, Spending
from tests.stack import Stack, eventually, state_of, submit

FILE = """
[[pools]]
name = "cpu"
engine = "fake"

[[pools]]
name = "burst"
engine = "cloudflare"
step_price = 0.001
spend_per_day = 10.5
tenant_spend_per_day = 2.0

[[routes]]
pools = ["cpu", "burst"]
"""
COUNTS = dict.fromkeys(("workers", "paused", "queued", "delayed", "running"), 0)
IDLE = {**COUNTS, "seconds": 0.0, "model": None, "tenants": {}}
FREE = {"spent": None, "spend_per_day": None, "tenant_spend_per_day": None}
CAPS = {"spend_per_day": 10.5, "tenant_spend_per_day": 2.0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pools.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def server(valkey_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey_url) as connection:
        connection.flushall()
        yield connection


def spend(server: redis.Redis, day: date, **millionths: int) -> None:
    """Write what the queue's scripts write when calls of ``burst`` are paid for."""
    key = f"img2img:{{0}}:spend:burst:{(day - date(1970, 1, 1)).days}"
    server.hset(key, mapping={ALL: sum(millionths.values()), **millionths})


def run(redis_url: str, file: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["pools", "--redis-url", redis_url, "--pools-file", str(file), *options])


def shown(redis_url: str, file: Path) -> list[dict[str, Any]]:
    result = run(redis_url, file, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


async def test_what_was_spent_is_read_by_pool_day_and_account(server: redis.Redis, valkey_url: str) -> None:
    async with open_redis(valkey_url) as connection:
        spending = Spending(connection)
        today = await spending.today()
        spend(server, today, acme=1_500_000, other=1)
        spend(server, today - timedelta(days=1), acme=7)
        assert await spending.of("burst", today) == {ALL: 1.500001, "acme": 1.5, "other": 0.000001}
        assert await spending.of("burst", today - timedelta(days=1)) == {ALL: 0.000007, "acme": 0.000007}
        assert await spending.of("burst", today - timedelta(days=2)) == {}
        assert await spending.of("cpu", today) == {}


def test_a_pool_that_does_nothing(server: redis.Redis, valkey_url: str, file: Path) -> None:
    """It is listed all the same, and spends nothing; one without prices knows no money at all."""
    assert shown(valkey_url, file) == [
        {"pool": "cpu", "engine": "fake", **IDLE, **FREE},
        {"pool": "burst", "engine": "cloudflare", **IDLE, **CAPS, "spent": 0.0},
    ]


def test_a_pool_at_work(server: redis.Redis, stack: Stack, valkey_url: str, file: Path) -> None:
    """Workers and jobs of its own queue, and what was spent in it, in JSON and as tables for people."""
    stack.worker(queue="cpu", pools_file=str(file))
    today = datetime.fromtimestamp(server.time()[0], UTC).date()
    for day in (today, today + timedelta(days=1)):  # midnight may pass
        spend(server, day, acme=1_500_000, refunded=0, other=1)
    with stack.gateway(queue="cpu").client() as client:
        job_id = submit(client, prompt="fake:step=60")["id"]
        eventually(lambda: state_of(client, job_id) == "running", "the first job is running")
        submit(client, prompt="a lion")
        cpu, burst = shown(valkey_url, file)
        assert (cpu["workers"], cpu["running"], cpu["queued"]) == (1, 1, 1)
        assert (burst["workers"], burst["running"], burst["queued"]) == (0, 0, 0)
        assert (burst["spent"], burst["tenants"]) == (1.500001, {"acme": 1.5, "other": 0.000001})
        table = run(valkey_url, file).output
        client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
    assert re.search(r"^cpu +fake +1 +1 +0 +1 +\d+ s *$", table, re.MULTILINE), table
    assert re.search(r"^burst +cloudflare +0 +0 +0 +0 +0 s +1\.500001 +10\.5 *$", table, re.MULTILINE), table
    assert re.search(r"\nSpent today in burst\n +acme +1\.5\n +other +0\.000001\n$", table), table


def test_paused_workers_are_told_apart(server: redis.Redis, valkey_url: str, file: Path) -> None:
    """A pool whose upstream takes no calls is not one that could work and does not."""

    async def beat() -> None:
        async with open_redis(valkey_url) as connection:
            for name, slots in (("a", 0), ("b", 4)):
                info = WorkerInfo(name, slots, "cloudflare", "model", "api", paused=not slots)
                await JobQueue(connection, "burst").beat(info, (), lease=60, ttl=60)

    asyncio.run(beat())
    assert [(pool["workers"], pool["paused"]) for pool in shown(valkey_url, file)] == [(0, 0), (2, 1)]
    table = run(valkey_url, file).output
    assert re.search(r"^burst +cloudflare +2 \(1 paused\) +0 +0 +0 +0 s", table, re.MULTILINE), table


def test_without_a_file_the_option_is_named(valkey_url: str) -> None:
    result = CliRunner().invoke(main, ["pools", "--redis-url", valkey_url])
    assert result.exit_code == 1
    assert "There is no pools file: name it with --pools-file, or set IMG2IMG_POOLS_FILE" in result.output
