"""What the HTTP server bounds of a connection: how long a head may be and take, and how long an answer may be read."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from gateway.rest import connection
from gateway.rest.connection import MAX_HEAD, BoundedConnection

SHORT = 0.05
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LONG_ANSWER = bytes(20_000_000)  # more than the kernel takes off the server's hands
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def answer(send: Any, status: int, body: bytes = b"") -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def late(scope: Any, receive: Any, send: Any) -> None:
    """Takes longer than a head may in these tests, and answers."""
    await asyncio.sleep(3 * SHORT)
    await answer(send, 204)


@asynccontextmanager
async def connected(app: Any = late, first: bytes = b"") -> AsyncIterator[Streams]:
    """A connection to a server of ``app``; ``first`` is sent before the server can know of it."""
    config = uvicorn.Config(app, http=BoundedConnection, lifespan="off", log_config=None)
    loop, state = asyncio.get_running_loop(), uvicorn.server.ServerState()
    server = await loop.create_server(lambda: BoundedConnection(config, state, {}), "127.0.0.1", 0)
    async with server:
        client = socket.create_connection(server.sockets[0].getsockname())
        client.sendall(first)
        reader, writer = await asyncio.open_connection(sock=client)
        yield reader, writer
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX:"])
async def test_a_head_that_does_not_end_is_given_up(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", SHORT)
    async with connected(first=sent) as (reader, _):
        assert await reader.read() == b""


async def test_an_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", SHORT)
    async with connected(first=GET) as (reader, writer):
        for _ in range(2):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
            writer.write(GET)


async def test_a_head_that_waits_for_an_answer_does_not_cost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the next request's, and given up once this one is answered."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", SHORT)
    async with connected(first=GET + GET[:10]) as (reader, _):
        assert (await reader.read()).count(b"HTTP/1.1 204 ") == 1


async def test_a_long_head_is_refused_and_a_long_body_is_not() -> None:
    async with connected() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"y" * (2 * MAX_HEAD))
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")


async def test_who_does_not_read_an_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the application hears of it, as of any client that went away."""
    monkeypatch.setattr(connection, "BODY_IDLE", SHORT)
    monkeypatch.setattr(connection, "BODY_RATE", 1e12)
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": LONG_ANSWER, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async with connected(app) as (_, writer):
        writer.write(GET)
        await asyncio.wait_for(gone.wait(), 30)


async def test_who_reads_gets_all_of_a_long_answer() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 200, LONG_ANSWER)

    async with connected(app) as (reader, writer):
        writer.write(GET.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        assert (await reader.read()).count(b"\0") == len(LONG_ANSWER)


async def test_an_offer_of_http_2_costs_no_body() -> None:
    """Java's own client makes one with each request."""

    bodies: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        await answer(send, 204)

    offer = b"POST / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    body = b"\r\nUpgrade: h2c\r\n\r\n"
    async with connected(app) as (reader, writer):
        for _ in range(2):
            writer.write(offer + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
    assert bodies == [body, body]
