"""Request bodies in: bounded while they arrive, decoded without holding up the event loop.

A picture as a JSON array of integers is by far the largest thing this service is sent (3.6 to 8.6 bytes of
JSON per byte of picture). Decoding it in a thread would not help, because the decoder holds the GIL. So the
arrays are cut out of the body by two byte searches each, decoded slice by slice with a turn of the event
loop in between, and what is left (a prompt and some numbers) goes through msgspec as a whole. What is left is
small by rule, which also bounds the time and memory that a hostile body can cost.
"""

import asyncio
import io
import re
import secrets
from collections.abc import AsyncIterable, Iterable
from typing import Final

import msgspec

from gateway.budget import Reservation
from img2img.errors import (
    Img2ImgError,
    InvalidImage,
    InvalidRequest,
    MalformedBody,
    MissingBody,
    RequestTooLarge,
)
from img2img.images import PictureLimits
from img2img.requests import integer_bytes

# One slice is decoded in about a third of a millisecond.
SLICE_BYTES: Final = 64 * 1024
# A search through this much takes about as long.
SEARCH_BYTES: Final = 4 * 1024 * 1024
# All of a body but its pictures: 100 kB hold the two longest prompts with every character escaped, and
# half a megabyte of the worst JSON (empty arrays) is decoded in 20 ms to 12 MB.
MAX_REST_BYTES: Final = 512 * 1024

_STRINGS_PER_TURN: Final = 512
_LEADING: Final = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*+")
_FIRST_BYTES: Final = b'{["-0123456789tfn'
_GZIP: Final = b"\x1f\x8b"
_SLOT: Final = secrets.token_hex(8)
_ARRAY_FIELDS: Final = frozenset({b"image", b"mask"})
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ARRAY_FOLLOWS: Final = re.compile(rb"[ \t\r\n]{0,64}:[ \t\r\n]{0,64}\[")
_STRING_FOLLOWS: Final = re.compile(rb'[ \t\r\n]{0,64}:[ \t\r\n]{0,64}(?=")')
_POSITION: Final = re.compile(r"(?:JSON is malformed: )?(.+?) \(byte (\d+)\)")

_anything: Final = msgspec.json.Decoder()
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text: Final = msgspec.json.Decoder(str)
_integers: Final = msgspec.json.Decoder(list[int])
_numbers: Final = msgspec.json.Decoder(list[float])

Buffer = bytes | bytearray


async def read_body(
    stream: AsyncIterable[bytes], limit: int, reservation: Reservation, content_length: int | None = None
) -> bytes:
    """Collect a body of at most ``limit`` bytes; a ``content_length`` is judged before the first chunk.

    Only what has arrived is reserved: who announces much and sends little takes nothing from the others.

    Raises:
        RequestTooLarge: names the limit.
        TooManyBytesInFlight: the process holds too many other bodies.
    """
    _check_length(content_length or 0, limit)
    reservation.check(content_length or 0)
    # getvalue() hands its buffer over, so that 64 MB are not copied once more at the end.
    body = io.BytesIO()
    async for chunk in stream:
        size = body.tell() + len(chunk)
        _check_length(size, limit)
        reservation.hold(size)
        body.write(chunk)
    return body.getvalue()


def _check_length(size: int, limit: int) -> None:
    if size > limit:
        raise RequestTooLarge(f"The body must be at most {limit} bytes: send a smaller picture, or base64")


async def decode_json(body: Buffer, max_image_bytes: int = PictureLimits().file_bytes) -> object:
    """Decode a body; ``image`` and ``mask`` come back as ``bytes`` where they were arrays of integers.

    The same holds for each object in ``requests``, the batch form. A leading byte order mark is ignored, the
    last of duplicate names counts, and JSON other than an object is returned as it is.

    Raises:
        MissingBody: nothing but white space.
        MalformedBody: not JSON; says where and what to send.
        InvalidRequest: an item of a picture is no integer 0..255, or a number is out of range.
        InvalidImage: a picture of more than ``max_image_bytes``.
        RequestTooLarge: more than ``MAX_REST_BYTES`` beside the pictures.
    """
    leading = _LEADING.match(body)
    begin = leading.end() if leading else 0
    if begin == len(body):
        raise MissingBody("The body is empty: send a JSON object with at least 'prompt'")
    if body.startswith(_GZIP):
        raise MalformedBody("The body is compressed: send it as it is, without Content-Encoding")
    if body[begin] not in _FIRST_BYTES:
        raise _malformed("invalid character", begin)
    document = _Document(body, begin, max_image_bytes)
    await document.split()
    return document.decode()


class _Document:
    """A body taken apart: pictures decoded and set aside, the rest kept with a slot for each."""

    def __init__(self, body: Buffer, begin: int, max_image_bytes: int) -> None:
        self._body = body
        self._position = begin
        self._max_image_bytes = max_image_bytes
        self._rest = bytearray()
        self._slots: dict[str, object] = {}
        # Where pieces of the rest begin: (offset in the rest, offset in the body).
        self._pieces: list[tuple[int, int]] = []

    async def split(self) -> None:
        """Walk from string to string, which is the only way to know what is inside of one."""
        body, depth, member, strings = self._body, 0, b"", 0
        while (quote := body.find(b'"', self._position)) >= 0:
            between = self._keep(quote)
            depth += between.count(b"{") + between.count(b"[") - between.count(b"}") - between.count(b"]")
            string = _STRING.match(body, quote, quote + MAX_REST_BYTES)
            if string is None:
                break
            self._keep(string.end())
            name = string.group()[1:-1]
            if depth == 1:
                member = name
            if depth == 1:
                await self._take(name)
            elif depth == 3 and member == b"requests":
                await self._take_from_request(name)
            strings += 1
            if strings % _STRINGS_PER_TURN == 0:
                await asyncio.sleep(0)
        self._keep(len(body))

    async def _take(self, name: bytes) -> None:
        """Set the value of ``name`` aside if it is a picture; the position stands behind the name."""
        if name in _ARRAY_FIELDS and (array := _ARRAY_FOLLOWS.match(self._body, self._position)):
            self._keep(array.end() - 1)
            self._fill_slot(await self._array(name.decode(), array.end()))
        elif name == b"image_b64" and (text := _STRING_FOLLOWS.match(self._body, self._position)):
            self._keep(text.end())
            if (end := _long_string_end(self._body, text.end())) > 0:
                with memoryview(self._body) as view:
                    decoded = _decode_text("image_b64", view[text.end() : end])
                self._position = end
                self._fill_slot(decoded)

    async def _take_from_request(self, name: bytes) -> None:
        """The same inside of a batch, where an error names the request as well."""
        try:
            await self._take(name)
        except InvalidRequest as exc:
            index = self._request_index()
            raise type(exc)(f"requests/{index}/{exc.field}", f"request {index}: {exc.reason}") from exc

    def _request_index(self) -> int:
        """Which request of a batch the walk is in: how many commas of the array have passed."""
        depth = index = 0
        for char in _STRING.sub(b"", self._rest):
            depth += (char in b"{[") - (char in b"}]")
            if char in b"," and depth <= 2:
                index = index + 1 if depth == 2 else 0
        return index

    async def _array(self, field: str, start: int) -> bytes:
        """Decode the array whose first item begins at ``start``, and stand behind its end.

        Its first ``]`` ends it: a string or a nested value that could hold another one is an error anyway.
        """
        body, picture = self._body, io.BytesIO()
        end = await self._find_bracket(start)
        position = start
        while True:
            cut = end if end - position <= SLICE_BYTES else body.rfind(b",", position, position + SLICE_BYTES)
            if cut < 0:  # one item as long as a slice, which no integer is
                integer_bytes(field, [None], picture.tell())
            piece = _items(field, bytes(body[position:cut]), picture.tell(), position)
            if not piece and (cut < end or position > start):
                raise _malformed("a value is missing", position)
            picture.write(piece)
            if picture.tell() > self._max_image_bytes:
                raise InvalidImage(field, f"'/{field}' must be at most {self._max_image_bytes} bytes")
            if cut == end:
                break
            position = cut + 1
            await asyncio.sleep(0)
        if end == len(body):
            raise _malformed(f"the array of '/{field}' has no end", end)
        self._position = end + 1
        return picture.getvalue()

    async def _find_bracket(self, start: int) -> int:
        """The index of the first ``]`` from ``start`` on, or the body's length."""
        for begin in range(start, len(self._body), SEARCH_BYTES):
            if (end := self._body.find(b"]", begin, begin + SEARCH_BYTES)) >= 0:
                return end
            await asyncio.sleep(0)
        return len(self._body)

    def _keep(self, end: int) -> bytes:
        """Move on to ``end``, and keep what is passed."""
        start, self._position = self._position, end
        if len(self._rest) + end - start > MAX_REST_BYTES:
            raise RequestTooLarge(
                f"Beside 'image', 'image_b64' and 'mask' a body may have {MAX_REST_BYTES} bytes: "
                "send pictures in those fields, and shorten the others"
            )
        self._pieces.append((len(self._rest), start))
        passed = bytes(self._body[start:end])
        self._rest += passed
        return passed

    def _fill_slot(self, value: object) -> None:
        # The random part keeps a sender from naming a slot in a string of his own.
        slot = f"{_SLOT}{len(self._slots)}"
        self._slots[slot] = value
        self._rest += b'"' + slot.encode() + b'"'

    def decode(self) -> object:
        """Decode the rest, and put the pictures where they belong."""
        try:
            if not self._rest.startswith(b"{"):
                return _anything.decode(self._rest)
            fields = _fields.decode(self._rest)
        except RecursionError as exc:
            raise MalformedBody("The body is nested too deeply: send one flat JSON object") from exc
        except UnicodeDecodeError as exc:
            raise MalformedBody("The body is not UTF-8: send JSON in UTF-8") from exc
        except msgspec.DecodeError as exc:
            raise self._explain(exc) from exc
        decoded = {name: _decode_value(name, raw) for name, raw in fields.items()}
        self._fill_in(decoded)
        requests = decoded.get("requests")
        inner = requests.values() if isinstance(requests, dict) else requests
        for request in inner if isinstance(inner, Iterable) else ():
            if isinstance(request, dict):
                self._fill_in(request)
        return decoded

    def _fill_in(self, fields: dict[str, object]) -> None:
        for name, value in fields.items():
            if isinstance(value, str) and value.startswith(_SLOT):
                fields[name] = self._slots.get(value, value)

    def _explain(self, error: msgspec.DecodeError) -> MalformedBody:
        found = _POSITION.search(str(error))
        if found is None:
            return _malformed("it ends too early, or has a broken \\u escape", len(self._body))
        in_rest = int(found[2])
        began, origin = next(piece for piece in reversed(self._pieces) if piece[0] <= in_rest)
        return _malformed(found[1], origin + in_rest - began)


def _decode_value(name: str, raw: msgspec.Raw) -> object:
    try:
        return _anything.decode(raw)
    except RecursionError as exc:
        raise MalformedBody(f"'/{name}' is nested too deeply: send a flat value") from exc
    except msgspec.ValidationError as exc:
        raise InvalidRequest(name, f"'/{name}' has a number that is out of range: send a smaller one") from exc
    except (UnicodeDecodeError, msgspec.DecodeError) as exc:
        raise MalformedBody(f"'/{name}' is not valid text: send UTF-8 and whole \\u escapes") from exc


def _decode_text(name: str, raw: memoryview) -> str:
    try:
        return _text.decode(raw)
    except (UnicodeDecodeError, msgspec.DecodeError) as exc:
        raise MalformedBody(f"'/{name}' is not valid text: send base64 in one JSON string") from exc


def _long_string_end(body: Buffer, quote: int) -> int:
    """The index behind the string that begins at ``quote``, or -1. Escapes are rare here and take longer."""
    end = body.find(b'"', quote + 1)
    if end < 0 or body.find(b"\\", quote, end) < 0:
        return end + 1
    string = _STRING.match(body, quote)
    return string.end() if string else -1


def _items(field: str, text: bytes, index: int, position: int) -> bytes:
    """Decode the items of one slice, of which the first is item ``index`` and lies at byte ``position``."""
    array = b"[%b]" % text
    try:
        return bytes(_integers.decode(array))
    except ValueError:
        pass
    try:
        numbers = _numbers.decode(array)
        whole = bytes(map(int, numbers))
        if list(whole) == numbers:
            return whole
    except (ValueError, OverflowError):
        pass
    raise _first_bad_item(field, text, index, position)


def _first_bad_item(field: str, text: bytes, index: int, position: int) -> Img2ImgError:
    for offset, token in enumerate(text.split(b",")):
        try:
            item = _anything.decode(token)
        except (ValueError, RecursionError) as exc:
            # What begins like a value holds the comma; what fails validation is a number beyond any float.
            begins = token.lstrip().startswith((b'"', b"[", b"{"))
            if not begins and not isinstance(exc, msgspec.ValidationError):
                return _malformed("not a number", position)
            item = None
        try:
            integer_bytes(field, [item], index + offset)
        except InvalidRequest as error:
            return error
        position += len(token) + 1
    return _malformed(f"'/{field}' is not an array of integers", position)


def _malformed(what: str, position: int) -> MalformedBody:
    return MalformedBody(f"The body is not JSON: {what} near byte {position}: send one JSON object in UTF-8")
