"""How the commands that use a running service find it, and how they show what it refuses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import msgspec

if TYPE_CHECKING:
    from img2img.client import AsyncClient, Client

Command = TypeVar("Command", bound=Callable[..., Any])

HINTS: Final = {
    "unavailable": "; `img2img up` starts one here",
    "missing_credentials": "; this command sends what --key or IMG2IMG_KEY has",
}
"""What the command can add to an error's own words."""


class Connection(msgspec.Struct, frozen=True):
    """Where the service is and who asks."""

    server: str
    key: str | None
    tls: bool
    ca: Path | None

    def open(self) -> "Client":
        from img2img.client import Client

        return Client(self.server, key=self.key, tls=self.tls, ca=self.ca)

    def open_async(self) -> "AsyncClient":
        from img2img.client import AsyncClient

        return AsyncClient(self.server, key=self.key, tls=self.tls, ca=self.ca)


def connection_options(command: Command) -> Command:
    """Add ``--server``, ``--key``, ``--tls`` and ``--ca``; ``take_connection`` collects their values."""
    for option in reversed(
        (
            click.option(
                "--server",
                envvar="IMG2IMG_SERVER",
                show_envvar=True,
                default="127.0.0.1:50051",
                show_default=True,
                metavar="HOST:PORT",
                help="The service's gRPC address.",
            ),
            click.option("--key", envvar="IMG2IMG_KEY", show_envvar=True, metavar="KEY", help="Your access key."),
            click.option("--tls", is_flag=True, help="Connect over TLS."),
            click.option(
                "--ca",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                metavar="FILE",
                help="Certificates (PEM) to trust in place of the system's; implies --tls.",
            ),
        )
    ):
        command = option(command)
    return command


def take_connection(given: dict[str, Any]) -> Connection:
    """Take the values of :func:`connection_options` out of a command's arguments."""
    return Connection(*(given.pop(name) for name in Connection.__struct_fields__))


@contextmanager
def queue_server_errors() -> Iterator[None]:
    """Tell where the address of a queue server that cannot be used comes from."""
    from img2img.errors import Unavailable

    try:
        yield
    except Unavailable as exc:
        raise click.ClickException(
            f"The queue server cannot be used ({exc.__cause__ or exc}): check --redis-url, or IMG2IMG_REDIS_URL; "
            "`img2img up` has a server of its own, whose address it prints"
        ) from exc


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the service refuses into one line and exit code 1."""
    from img2img.client import ClientError

    try:
        yield
    except ClientError as exc:
        fields = "".join(
            f"\n  {item.field}: {item.description}" for item in exc.violations if item.description not in exc.message
        )
        again = f" (try again in {exc.retry_after:g} s)" if exc.retry_after else ""
        raise click.ClickException(f"{exc.message}{again}{HINTS.get(exc.code, '')} [{exc.code}]{fields}") from exc
