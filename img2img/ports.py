"""Ports of this machine that are free to listen on."""

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Final

from img2img.errors import ConfigurationError

PATIENCE: Final = 1.0
PAUSE: Final = 0.05
FIRST: Final = 10_000
BELOW: Final = 32_768
"""From here on systems give ports to whoever asks for any, connections among them."""


def any_port() -> int:
    """A port that nobody is given by chance: a free one stays so until the process that needs it is up, or up again."""
    return FIRST + secrets.randbelow(BELOW - FIRST)


async def free_ports(host: str, wanted: Mapping[str, int]) -> list[int]:
    """The ports that the options named in ``wanted`` ask for, with a free one in place of each 0.

    Raises:
        ConfigurationError: a port cannot be used; names it, why, and the option that changes it.
    """
    with contextlib.ExitStack() as sockets:
        # All are held until all are found, so that no two are the same.
        return [await _reserve(sockets, host, port, option) for option, port in wanted.items()]


async def _reserve(sockets: contextlib.ExitStack, host: str, port: int, option: str) -> int:
    holder = sockets.enter_context(socket.socket())
    # As a server does it: connections that are only lingering are no obstacle, a listener is one.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deadline = time.monotonic() + PATIENCE  # a gateway that was just killed needs a moment to go
    while True:
        try:
            holder.bind((host, port or any_port()))
            holder.listen()
        except OSError as exc:
            if time.monotonic() > deadline:
                why = (exc.strerror or str(exc)).lower()
                message = f"Port {port} cannot be used ({why}): stop what uses it, or choose another with"
                raise ConfigurationError(f"{message} {option}") from exc
            await asyncio.sleep(PAUSE)
        else:
            return int(holder.getsockname()[1])
