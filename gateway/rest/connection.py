"""A connection of the HTTP server, with bounds that uvicorn and its parser do not have.

They keep a request's head, and what follows a chunked body, until it is whole, and wait for it for ever: whoever can
reach the port, without a key, could fill the memory with one connection or use up all of the process's. They also keep
for ever what a client does not read.
"""

import asyncio
import re
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.rest.context import BODY_IDLE, BODY_RATE

MAX_HEAD: Final = 64 * 1024
"""Bytes of a head, as far as it comes in more than one piece; a piece is 256 KiB at most."""
HEAD_SECONDS: Final = 30.0
"""How long a head may take that has begun, and a new connection without one."""
UPGRADE: Final = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)
"""With which Java's own client offers HTTP/2 in each request. The parser would drop the request's body for it."""


class BoundedConnection(HttpToolsProtocol):
    """Ends with status 400 when what it is sent gets too long without coming to anything.

    It is cut off when a head takes too long, or an answer is read more slowly than a body may be sent.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._came_to_something = False
        self._pending = 0
        self._giving_up: asyncio.TimerHandle | None = None
        self._cutting_off: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_whole()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._came_to_something = False
        super().data_received(data if self._reads_body() else _without_upgrade(data))
        self._pending = 0 if self._came_to_something else self._pending + len(data)
        if self._pending > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The request's header is longer than {MAX_HEAD} bytes: send less in it")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._is_read()
        seconds = BODY_IDLE + self.transport.get_write_buffer_size() / BODY_RATE
        self._cutting_off = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._came_to_something = True
        self._head_is_whole()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._came_to_something = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._came_to_something = True
        super().on_message_complete()

    def _reads_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def _wait_for_head(self) -> None:
        if self._giving_up is None:
            self._giving_up = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._giving_up = None
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()
        else:  # the head is the next request's: it must not cost this one its answer
            self._wait_for_head()

    def _head_is_whole(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _is_read(self) -> None:
        if self._cutting_off is not None:
            self._cutting_off.cancel()
            self._cutting_off = None


def _without_upgrade(data: bytes) -> bytes:
    """The first piece of a request, without an offer of HTTP/2 in its head."""
    found = UPGRADE.search(data, 0, data.find(b"\r\n\r\n") + 2)
    return data[: found.start()] + data[found.end() :] if found else data
