"""``img2img upstream``: what the calls of the cloudflare engine were, and cost."""

from typing import TYPE_CHECKING, Final

import click

from img2img.cli.times import rounded

if TYPE_CHECKING:
    from img2img.upstream import Books

MAX_DAYS: Final = 35


@click.command(
    short_help="Show what the cloudflare engine's calls cost.",
    epilog="\b\nExamples:\n"
    "  img2img upstream\n"
    "  img2img upstream --days 30 --json\n"
    "  img2img upstream --redis-url redis://queue:6379/0",
)
@click.option("--redis-url", metavar="URL", help="The Redis or Valkey server.  [IMG2IMG_REDIS_URL]")
@click.option("--days", type=click.IntRange(1, MAX_DAYS), default=7, show_default=True, help="The latest so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs: one object an account.")
def upstream(redis_url: str | None, days: int, as_json: bool) -> None:
    """Show calls, pictures and neurons of each upstream account by day (UTC), and whether it is parked."""
    import asyncio

    import msgspec

    from img2img.settings import Settings

    settings = Settings.from_environment(redis_url=redis_url)
    found = asyncio.run(_read(settings.redis_url, days))
    if as_json:
        for books in found:
            click.echo(msgspec.json.encode(books).decode())
    else:
        _print(found)


async def _read(redis_url: str, days: int) -> "list[Books]":
    from img2img.upstream import Rates, open_ledger

    async with open_ledger(redis_url, Rates()) as ledger:
        return [await ledger.books(account, days) for account in await ledger.accounts()]


def _print(found: "list[Books]") -> None:
    if not found:
        click.echo("No calls.")
    for books in found:
        parked = f", parked for {rounded(books.parked_seconds)}" if books.parked_seconds else ""
        click.echo(f"{books.account}{parked}")
        for spent in books.days:
            click.echo(
                f"  {spent.day}  {spent.calls:>8} calls  {spent.pictures:>8} pictures  {spent.neurons:>12g} neurons"
            )
