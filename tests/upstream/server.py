"""The stand-in's port: HTTP/1.1, and HTTP/2 for callers that ask for it over TLS."""

import asyncio
import ssl
from pathlib import Path
from typing import Any, Self

import h11
from h2.exceptions import H2Error

from tests.upstream.api import Api
from tests.upstream.http1 import Http1Connection
from tests.upstream.http2 import Http2Connection


class Upstream:
    """A server on ``port`` of 127.0.0.1 (0: any free one), open within its block.

    With a ``certificate`` (PEM files of it and its key) it speaks TLS, and HTTP/2 to who prefers it.
    """

    def __init__(self, api: Api, port: int = 0, certificate: tuple[Path, Path] | None = None) -> None:
        self.api = api
        self.port = port
        self._tls = None if certificate is None else _tls(*certificate)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        """The base URL, as ``https://api.cloudflare.com/client/v4`` is Cloudflare's."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/client/v4"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        tls = writer.get_extra_info("ssl_object")
        kind = Http2Connection if tls and tls.selected_alpn_protocol() == "h2" else Http1Connection
        try:
            await kind(self.api, reader, writer).serve()
        except (OSError, h11.RemoteProtocolError, H2Error, asyncio.CancelledError):
            pass  # whoever ended it, there is nobody left to tell
        finally:
            self._connections.discard(task)
            writer.close()


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context
