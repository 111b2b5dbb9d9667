"""HTTP/2, which Cloudflare's API speaks to who asks for it: each call is a stream, and may be reset alone."""

import asyncio
from typing import Final

import msgspec
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error

from tests.upstream.answers import Answer
from tests.upstream.api import Api, Request
from tests.upstream.calls import Call
from tests.upstream.sending import pause, pieces, turn

# The hop-by-hop headers of HTTP/1.1 do not exist here.
FORBIDDEN: Final = frozenset({"connection", "transfer-encoding"})


class Stream(msgspec.Struct):
    """A request that is coming in, and the task that answers it."""

    headers: dict[str, str]
    body: bytearray
    answering: "asyncio.Task[None] | None" = None


class Http2Connection:
    """One caller's connection and its streams."""

    def __init__(self, api: Api, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._api = api
        self._reader, self._writer = reader, writer
        # Some answers break the rules.
        lax = H2Configuration(client_side=False, header_encoding="utf-8", validate_outbound_headers=False)
        self._protocol = H2Connection(lax)
        self._streams: dict[int, Stream] = {}
        self._window = asyncio.Event()

    async def serve(self) -> None:
        """Until the caller hangs up, or the connection is ended for an answer's sake."""
        self._protocol.initiate_connection()
        self._flush()
        try:
            while data := await self._reader.read(1024 * 1024):
                for event in self._protocol.receive_data(data):
                    if isinstance(event, ConnectionTerminated):
                        return
                    self._on(event)
                self._flush()
        finally:
            tasks = [stream.answering for stream in self._streams.values() if stream.answering is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _on(self, event: Event) -> None:
        match event:
            case RequestReceived(stream_id=number, headers=headers):
                self._streams[number] = Stream({str(name): str(value) for name, value in headers}, bytearray())
            case DataReceived(stream_id=number, data=data, flow_controlled_length=length):
                self._streams[number].body += data
                self._protocol.acknowledge_received_data(length, number)
            case StreamEnded(stream_id=number):
                stream = self._streams[number]
                stream.answering = asyncio.create_task(self._answer(number, stream))
            case StreamReset(stream_id=number):
                stream = self._streams.pop(number)
                if stream.answering is not None:
                    stream.answering.cancel()
            case WindowUpdated() | RemoteSettingsChanged():
                self._window.set()

    async def _answer(self, number: int, stream: Stream) -> None:
        headers = stream.headers
        request = Request(headers[":method"], headers[":path"], headers, bytes(stream.body))
        if request.path.startswith("/control/"):
            await self._send(number, self._api.control(request))
            return
        call = self._api.begin(request)
        try:
            await self._behave(number, call, request)
        except (OSError, H2Error, asyncio.CancelledError):
            call.ended = "gone"
        finally:
            self._api.end(call)
            self._streams.pop(number, None)

    async def _behave(self, number: int, call: Call, request: Request) -> None:
        answer = await self._api.answer(call, request)
        await turn(self._api, answer)
        await self._send(number, answer)
        call.ended = "answered" if answer.end == "keep" else "closed"

    async def _send(self, number: int, answer: Answer) -> None:
        """As it says, in so far as this protocol has the same; a reset or early end is that of the stream."""
        if answer.wire is None:
            self._protocol.send_headers(number, _head(answer))
            for piece, seconds in pieces(answer):
                await self._send_data(number, piece)
                await pause(seconds)
        if answer.wire is not None or answer.sent is not None:
            self._protocol.reset_stream(number, ErrorCodes.INTERNAL_ERROR)
        else:
            self._protocol.end_stream(number)
        self._flush()
        if answer.end == "close":
            self._protocol.close_connection()
            self._flush()
            self._writer.close()

    async def _send_data(self, number: int, data: bytes) -> None:
        while data:
            self._window.clear()
            room = min(self._protocol.local_flow_control_window(number), self._protocol.max_outbound_frame_size)
            if room > 0:
                self._protocol.send_data(number, data[:room])
            data = data[room:]
            self._flush()
            await (self._writer.drain() if room > 0 else self._window.wait())

    def _flush(self) -> None:
        self._writer.write(self._protocol.data_to_send())


def _head(answer: Answer) -> list[tuple[str, str]]:
    headers = {name: value for name, value in answer.headers.items() if name not in FORBIDDEN}
    if not answer.chunked and answer.declared != -1:
        headers["content-length"] = str(len(answer.body) if answer.declared is None else answer.declared)
    return [(":status", str(answer.status)), *headers.items()]
