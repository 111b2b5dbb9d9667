"""``img2img pools``: what the pools of workers do, and what they have cost today."""

import sys
from typing import TYPE_CHECKING, Final

import click

from img2img.cli.jobs import PIPE_WIDTH, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from img2img.overview import PoolOverview

DIGITS: Final = 6


@click.command(
    short_help="Show what each pool of workers does and costs.",
    epilog="\b\nExamples:\n"
    "  img2img pools --pools-file pools.toml\n"
    "  IMG2IMG_POOLS_FILE=pools.toml img2img pools --redis-url redis://queue:6379/0\n"
    "  img2img pools --json | jq '[.pool, .spent]'",
)
@click.option("--redis-url", metavar="URL", help="The Redis or Valkey server.  [IMG2IMG_REDIS_URL]")
@click.option("--pools-file", metavar="FILE", help="The pools and routes.  [IMG2IMG_POOLS_FILE]")
@json_option
def pools(redis_url: str | None, pools_file: str | None, as_json: bool) -> None:
    """Show each pool's workers, jobs and seconds of work, and what was spent today (UTC), in all and by account.

    With --json one object a pool. What is reserved for calls to come counts as spent.
    """
    import asyncio

    import msgspec

    from img2img.errors import ConfigurationError
    from img2img.settings import Settings

    settings = Settings.from_environment(redis_url=redis_url, pools_file=pools_file)
    if settings.pools_file is None:
        raise ConfigurationError("There is no pools file: name it with --pools-file, or set IMG2IMG_POOLS_FILE")
    found = asyncio.run(_read(settings.redis_url, settings.pools_file))
    if as_json:
        for pool in found:
            click.echo(msgspec.json.encode(pool).decode())
    else:
        _print(found)


async def _read(redis_url: str, pools_file: "Path") -> "list[PoolOverview]":
    from img2img.overview import overview
    from img2img.pools import Pools
    from img2img.server import open_redis

    known = Pools.load(pools_file)
    async with open_redis(redis_url) as redis:
        return await overview(redis, known)


def _print(found: "list[PoolOverview]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("Pool", "Engine", box=None, pad_edge=False)
    for name in ("Workers", "Queued", "Delayed", "Running", "Work", "Spent today", "Cap"):
        table.add_column(name, justify="right")
    for pool in found:
        workers = f"{pool.workers} ({pool.paused} paused)" if pool.paused else str(pool.workers)
        counts = (workers, pool.queued, pool.delayed, pool.running)
        money = (_amount(pool.spent), _amount(pool.spend_per_day))
        table.add_row(pool.pool, pool.engine, *map(str, counts), f"{pool.seconds:.0f} s", *money)
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
    for pool in found:
        if pool.tenants:
            click.echo(f"\nSpent today in {pool.pool}")
        for account, amount in pool.tenants.items():
            click.echo(f"  {account:<32} {_amount(amount):>12}")


def _amount(amount: float | None) -> str:
    """Without a fraction's closing zeros; "" for what is not bounded, or costs nothing."""
    return "" if amount is None else f"{amount:.{DIGITS}f}".rstrip("0").rstrip(".")
