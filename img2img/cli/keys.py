"""``img2img keys``: access keys, of which the service only ever sees a hash."""

import hashlib
import re
import secrets
from typing import Final

import click

KEY_PREFIX: Final = "i2i_"  # so that secret scanners and people recognise one
ACCOUNT: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it stands in URLs


def check_account(_: click.Context, __: click.Parameter, account: str | None) -> str | None:
    if account is not None and ACCOUNT.fullmatch(account) is None:
        raise click.BadParameter("use 1 to 64 letters, digits, - and _")
    return account


@click.group(epilog="\b\nExample:\n  img2img keys new acme >> tenants.toml")
def keys() -> None:
    """Make access keys."""


@keys.command(
    epilog="\b\nExamples:\n"
    "  img2img keys new acme\n"
    "  img2img keys new acme >> tenants.toml     the key itself goes to the terminal, not the file\n"
    "  img2img keys new --operator keda          for who runs the service, an autoscaler for instance"
)
@click.argument("account", required=False, callback=check_account)
@click.option("--operator", metavar="NAME", callback=check_account, help="Make an operator's key instead.")
def new(account: str | None, operator: str | None) -> None:
    """Make a key for ACCOUNT, or for an operator, who has no jobs but sees what autoscalers ask.

    The key is shown once, on standard error, and stored nowhere. What belongs in the gateway's tenants file
    (IMG2IMG_TENANTS_FILE) goes to standard output; it has only the key's hash.
    """
    if (account is None) == (operator is None):
        raise click.UsageError("Give either ACCOUNT or --operator NAME")
    table, field, name = ("tenants", "account", account) if operator is None else ("operators", "name", operator)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    click.echo(f"Key for {name}, shown only now: {key}\n", err=True)
    click.echo(f'[[{table}]]\n{field} = "{name}"\nkey_sha256 = ["{digest}"]')
