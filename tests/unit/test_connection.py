"""Requests whose head does not end, and what is none of those."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from gateway.rest import connection
from gateway.rest.connection import MAX_HEAD, BoundedConnection

HEAD_SECONDS = 0.05
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Takes longer than a head may in these tests, and answers."""
    await asyncio.sleep(3 * HEAD_SECONDS)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@asynccontextmanager
async def connected(seconds: float, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Streams]:
    """A connection to a server that waits so long for heads."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", seconds)
    config = uvicorn.Config(app, http=BoundedConnection, lifespan="off", log_config=None)
    loop, state = asyncio.get_running_loop(), uvicorn.server.ServerState()
    server = await loop.create_server(lambda: BoundedConnection(config, state, {}), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield reader, writer
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX:"])
async def test_a_head_that_does_not_end_is_given_up(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(HEAD_SECONDS, monkeypatch) as (reader, writer):
        writer.write(sent)
        assert await reader.read() == b""


async def test_an_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(HEAD_SECONDS, monkeypatch) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")


async def test_a_long_head_is_refused_and_a_long_body_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(60, monkeypatch) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"y" * (2 * MAX_HEAD))
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
