"""HTTP/1.1 by hand: requests are read by h11, answers are written as bytes, since half of them break its rules."""

import asyncio
import socket
import struct
from http import HTTPStatus
from typing import Final

import h11

from tests.upstream.answers import Answer
from tests.upstream.api import Api, Request
from tests.upstream.calls import Call
from tests.upstream.sending import pause, pieces, turn

NO_LINGER: Final = struct.pack("ii", 1, 0)


class Http1Connection:
    """One caller's connection, request after request."""

    def __init__(self, api: Api, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._api = api
        self._reader, self._writer = reader, writer
        self._left = b""

    async def serve(self) -> None:
        """Until the caller hangs up, or the connection is ended for an answer's sake."""
        while await self._answer_one():
            pass

    async def _answer_one(self) -> bool:
        """Read a request and answer it; whether there may be another one."""
        request = await self._read()
        if request is None:
            return False
        if request.path.startswith("/control/"):
            return await self._send(self._api.control(request))
        call = self._api.begin(request)
        listening = asyncio.create_task(self._listen())
        answering = asyncio.create_task(self._answer(call, request))
        try:
            await asyncio.wait({listening, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                call.ended = "gone"
                return False
            kept = answering.result()
            call.ended = "answered" if kept else "closed"
            return kept
        except OSError:
            call.ended = "gone"
            return False
        finally:
            self._api.end(call)
            for task in (listening, answering):
                task.cancel()
            await asyncio.gather(listening, answering, return_exceptions=True)

    async def _read(self) -> Request | None:
        """The next request, or None where the caller has closed the connection."""
        parser = h11.Connection(h11.SERVER)
        if self._left:
            parser.receive_data(self._left)
        head: h11.Request | None = None
        body = bytearray()
        while True:
            match parser.next_event():
                case h11.NEED_DATA:
                    parser.receive_data(await self._reader.read(1024 * 1024))
                case h11.Request() as head:
                    if parser.they_are_waiting_for_100_continue:
                        self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                case h11.Data(data=data):
                    body += data
                case h11.EndOfMessage():
                    self._left = parser.trailing_data[0]
                    assert head is not None
                    headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
                    return Request(head.method.decode(), head.target.decode(), headers, bytes(body))
                case _:
                    return None

    async def _listen(self) -> None:
        """Until the caller hangs up; what it sends meanwhile is its next request's beginning."""
        while data := await self._reader.read(1024):
            self._left += data

    async def _answer(self, call: Call, request: Request) -> bool:
        answer = await self._api.answer(call, request)
        await turn(self._api, answer)
        return await self._send(answer)

    async def _send(self, answer: Answer) -> bool:
        """Write it as it says; whether the connection is left open."""
        if answer.wire is None:
            await self._write(_head(answer))
            await self._send_body(answer)
        else:
            await self._write(answer.wire)
        if answer.end == "reset":
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        return answer.end == "keep"

    async def _send_body(self, answer: Answer) -> None:
        for piece, seconds in pieces(answer):
            await self._write(b"%x\r\n%b\r\n" % (len(piece), piece) if answer.chunked else piece)
            await pause(seconds)
        if answer.chunked and answer.sent is None:
            await self._write(b"0\r\n\r\n")

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


def _head(answer: Answer) -> bytes:
    headers = dict(answer.headers)
    if answer.chunked:
        headers["transfer-encoding"] = "chunked"
    elif answer.declared != -1:
        headers["content-length"] = str(len(answer.body) if answer.declared is None else answer.declared)
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase if answer.status < 520 else 'Unknown'}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
