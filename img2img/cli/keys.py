"""``img2img keys``: access keys, of which the service only ever sees a hash."""

import hashlib
import re
import secrets
from typing import Final

import click

KEY_PREFIX: Final = "i2i_"  # so that secret scanners and people recognise one
ACCOUNT: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it stands in URLs


def check_account(_: click.Context, __: click.Parameter, account: str) -> str:
    if ACCOUNT.fullmatch(account) is None:
        raise click.BadParameter("use 1 to 64 letters, digits, - and _")
    return account


@click.group(epilog="\b\nExample:\n  img2img keys new acme >> tenants.toml")
def keys() -> None:
    """Make access keys."""


@keys.command(
    epilog="\b\nExamples:\n"
    "  img2img keys new acme\n"
    "  img2img keys new acme >> tenants.toml     the key itself goes to the terminal, not the file"
)
@click.argument("account", callback=check_account)
def new(account: str) -> None:
    """Make a key for ACCOUNT.

    The key is shown once, on standard error, and stored nowhere. What belongs in the gateway's tenants file
    (IMG2IMG_TENANTS_FILE) goes to standard output; it has only the key's hash.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    click.echo(f"Key for {account}, shown only now: {key}\n", err=True)
    click.echo(f'[[tenants]]\naccount = "{account}"\nkey_sha256 = ["{digest}"]')
