"""Bodies: bounded while they arrive, and decoded as JSON says, pictures as bytes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.budget import DECODE_FACTOR, ByteBudget
from gateway.rest.bodies import MAX_REST_BYTES, SLICE_BYTES, decode_json, read_body
from img2img.errors import (
    Img2ImgError,
    InvalidImage,
    InvalidRequest,
    MalformedBody,
    MissingBody,
    RequestTooLarge,
    TooManyBytesInFlight,
)
from img2img.requests import build_request

LAYOUTS: dict[str, Callable[[object], str]] = {
    "compact": lambda value: json.dumps(value, separators=(",", ":")),
    "spaced": json.dumps,
    "pretty": lambda value: json.dumps(value, indent=2),
    "tabs": lambda value: json.dumps(value, indent="\t").replace("\n", "\r\n"),
}
PICTURE = bytes(range(256)) * 400


def decode(body: str | bytes | bytearray, **kwargs: Any) -> Any:
    return asyncio.run(decode_json(body.encode() if isinstance(body, str) else body, **kwargs))


def error_of(body: str | bytes, **kwargs: Any) -> Img2ImgError:
    with pytest.raises(Img2ImgError) as caught:
        decode(body, **kwargs)
    return caught.value


class TestPictures:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("field", ["image", "mask"])
    def test_an_array_of_integers_becomes_bytes_in_every_layout(self, layout: str, field: str) -> None:
        body = LAYOUTS[layout]({"prompt": "a cat", field: list(PICTURE), "num_steps": 4})
        assert len(body) > 3 * SLICE_BYTES
        assert decode(body) == {"prompt": "a cat", field: PICTURE, "num_steps": 4}

    def test_a_bytearray_is_as_good_as_bytes(self) -> None:
        assert decode(bytearray(b'{"image_b64": "QUJD", "image": [1, 2]}')) == {
            "image_b64": "QUJD",
            "image": b"\x01\x02",
        }

    @pytest.mark.parametrize(
        ("array", "expected"),
        [
            ("[]", b""),
            ("[ \n ]", b""),
            ("[7]", b"\x07"),
            ("[20.0, 1e2, 2550E-1, -0, -0.0, 0.0]", bytes([20, 100, 255, 0, 0, 0])),
        ],
    )
    def test_every_spelling_of_a_whole_number_counts(self, array: str, expected: bytes) -> None:
        assert decode(f'{{"image": {array}}}') == {"image": expected}

    def test_a_large_array_of_floats_becomes_bytes(self) -> None:
        assert decode(json.dumps({"image": [float(item) for item in PICTURE]})) == {"image": PICTURE}

    @settings(max_examples=60, deadline=None)
    @given(lead=st.integers(0, 200), size=st.integers(SLICE_BYTES // 4 - 20, SLICE_BYTES // 4 + 20))
    def test_where_a_slice_is_cut_does_not_matter(self, lead: int, size: int) -> None:
        """Items of 100 are four bytes with their comma, so the sizes lie around one and two slices."""
        body = b'{"image":[' + b" " * lead + b",".join([b"100"] * size) + b"]}"
        assert decode(body) == {"image": b"d" * size}

    def test_the_batch_form_has_its_pictures_decoded_too(self) -> None:
        requests = [{"prompt": "a", "image": [1, 2]}, {"prompt": "b", "mask": [3]}, 5]
        assert decode(json.dumps({"requests": requests})) == {
            "requests": [{"prompt": "a", "image": b"\x01\x02"}, {"prompt": "b", "mask": b"\x03"}, 5]
        }

    def test_the_last_of_two_pictures_counts(self) -> None:
        assert decode('{"image": [1], "image": [2]}') == {"image": b"\x02"}
        assert decode('{"image": [1], "image": "x"}') == {"image": "x"}

    def test_other_tasks_have_their_turn_between_slices(self) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async def scenario(body: bytes) -> None:
            counting = asyncio.create_task(count(), name="count")
            await decode_json(body)
            counting.cancel()

        body = LAYOUTS["pretty"]({"image": list(PICTURE)}).encode()
        asyncio.run(scenario(body))
        assert turns >= len(body) // SLICE_BYTES


class TestBadPictures:
    @pytest.mark.parametrize(
        "items",
        [
            [256],
            [1, -1],
            [1, 2, "a"],
            [1.5],
            [0, -0.5],
            [True],
            [1, False],
            [1, None],
            [[1], 2],
            [1, [2, 3]],
            [1, {"a": [1, 2]}],
            ["a]b"],
            [1, "a,b", 2],
            [10**30],
            [1e300],
            [1] * 40_000 + [256],
            [1.0] * 40_000 + ["x"],
        ],
        ids=lambda items: str(items)[-20:],
    )
    def test_the_first_bad_item_is_named_as_the_request_model_names_it(self, items: list[object]) -> None:
        with pytest.raises(InvalidRequest) as expected:
            build_request({"prompt": "x", "image": items})
        got = error_of(json.dumps({"prompt": "x", "image": items}))
        assert (type(got), str(got)) == (type(expected.value), str(expected.value))

    def test_the_index_counts_over_all_slices(self) -> None:
        items: list[object] = [*PICTURE]
        items[90_017] = 999
        assert str(error_of(LAYOUTS["pretty"]({"image": items}))) == (
            "'/image/90017' must be an integer between 0 and 255"
        )

    @pytest.mark.parametrize("number", ["1e400", "-1e400", "1" * 100_000, "0." + "0" * 100_000])
    def test_a_monstrous_number_is_an_invalid_item(self, number: str) -> None:
        error = error_of(f'{{"mask": [1, {number}]}}')
        assert str(error) == "'/mask/1' must be an integer between 0 and 255"

    def test_more_items_than_a_picture_may_have_are_refused_early(self) -> None:
        """The rest of the array is not even looked at: it is not JSON."""
        error = error_of(b'{"image": [' + b"1," * SLICE_BYTES + b"oops", max_image_bytes=1000)
        assert isinstance(error, InvalidImage)
        assert str(error) == "'/image' must be at most 1000 bytes"

    @pytest.mark.parametrize(
        "array",
        [
            "[1,,2]", "[,1]", "[1,]", "[ , ]", "[1 2]", "[01]", "[+1]", "[1.]", "[.5]", "[0x10]", "[NaN]",
            "[1", "[1,", "[", "[1;2]", "[tru]", "[1\x00]", "[\x0b1]", "[--1]",
        ],
    )  # fmt: skip
    def test_a_broken_array_is_no_json(self, array: str) -> None:
        assert isinstance(error_of(f'{{"image": {array}}}'), MalformedBody)

    @pytest.mark.parametrize("tail", ["", ",", ", ", ",,1", ", 1 1"])
    def test_a_broken_end_behind_a_slice_is_no_json(self, tail: str) -> None:
        """A comma before the bracket is found even where a slice is cut exactly there."""
        for size in range(SLICE_BYTES // 4 - 2, SLICE_BYTES // 4 + 3):
            body = b'{"image":[' + b",".join([b"100"] * size) + tail.encode() + b"]}"
            if tail:
                assert isinstance(error_of(body), MalformedBody)
            else:
                assert len(decode(body)["image"]) == size


class TestOtherValues:
    @pytest.mark.parametrize(
        "fields",
        [
            {"prompt": 'say "image": [1, 2]', "num_steps": 3},
            {'x"image': [1, 2]},
            {"prompt": 'back\\slash\\\\" "image": [1]', "image_b64": 'a\\"b'},
            {"options": {"image": [1, 2], "mask": [[3]]}, "mask": None},
            {"image": "abc", "mask": {"a": 1}},
            {"prompt": "image", "image": 5},
            {"image_b64": "QUJD" * 10, "prompt": "ü 🎈 \u2028"},
            {"image_b64": [1, 2]},
            {"images": [1, 2, 300], "requests": {"a": {"x": [1]}}},
            {"seed": 2**64, "strength": -0.5, "guidance": 1e22},
            {},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_everything_else_is_decoded_as_json(self, fields: object, layout: str) -> None:
        assert decode(LAYOUTS[layout](fields)) == fields

    @pytest.mark.parametrize("value", [None, True, 1.5, "x", "image", [], [{"image": [1, 2]}], ["image", [1]]])
    def test_json_other_than_an_object_comes_back_as_it_is(self, value: object) -> None:
        assert decode(json.dumps(value)) == value

    def test_escaped_slashes_in_base64_are_taken(self) -> None:
        """Some encoders write ``/`` as ``\\/``."""
        assert decode(b'{"image_b64":"AB\\/CD\\/=", "seed":1}') == {"image_b64": "AB/CD/=", "seed": 1}

    def test_a_byte_order_mark_is_ignored(self) -> None:
        assert decode(b'\xef\xbb\xbf \n{"image":[1]}') == {"image": b"\x01"}

    def test_the_last_of_duplicate_names_counts(self) -> None:
        assert decode('{"prompt": "a", "prompt": "b"}') == {"prompt": "b"}


class TestBadBodies:
    @pytest.mark.parametrize("body", [b"", b" \r\n\t ", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
    def test_nothing_at_all_is_a_missing_body(self, body: bytes) -> None:
        assert isinstance(error_of(body), MissingBody)

    @pytest.mark.parametrize(
        "body",
        [
            b"prompt=a+cat", b"{", b'{"prompt"', b'{"prompt":', b'{"prompt":"a"', b'{"prompt":"a', b'"',
            b"{]", b'{"a":1}x', b'{"a":1}{"b":2}', b"{'a':1}", b"{a:1}", b'{"a":NaN}', b'{"a":Infinity}',
            b'{"a":1,}', b"nul", b"--boundary\r\n", b'{"a":"\n"}', b'{"a":"\\q"}', b'{"a":"\xff"}',
            b'{"\xff":1}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\\ud800"}', b'{"image_b64":"\xff"}',
            b'{"image_b64":"a', b'{"image_b64":"\\"', b'{"image_b64":"\n"}',
            b"\x89PNG\r\n" + bytes(10**6), b"\xff\xd8\xff" * 10**6,
            '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32-le"),
        ],
        ids=lambda body: repr(body[:24]),
    )  # fmt: skip
    def test_what_is_not_json_is_malformed_with_a_remedy(self, body: bytes) -> None:
        error = error_of(body)
        assert isinstance(error, MalformedBody)
        assert ": send " in str(error)

    @pytest.mark.parametrize(
        ("body", "position"),
        [
            (b'{"a" 1}', 5),
            (b'{"a":1}x', 8),
            (b"oops", 0),
            (b'\xef\xbb\xbf {"a" 1}', 9),
            (b'{"image": [1, 2, 3], "a" 1}', 25),
            (b'{"image_b64": "QUJD", "a" 1}', 26),
            (b'{"image":[1,2,oops,3]}', 14),
        ],
    )
    def test_the_position_is_that_in_the_body(self, body: bytes, position: int) -> None:
        """Also behind pictures, which the decoder of the rest never sees."""
        assert f" near byte {position}:" in str(error_of(body))

    @pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"image":[['])
    def test_deep_nesting_is_an_error_and_not_a_crash(self, opening: bytes) -> None:
        for times in (20_000, 2_000_000):
            assert isinstance(error_of(opening * times), MalformedBody | RequestTooLarge | InvalidRequest)

    @pytest.mark.parametrize("body", [b'{"guidance": 1e400}', b'{"guidance": [{"a": -1e999}]}'])
    def test_a_number_beyond_any_float_names_its_field(self, body: bytes) -> None:
        error = error_of(body)
        assert isinstance(error, InvalidRequest)
        assert error.field == "guidance"

    @pytest.mark.parametrize(
        "rest",
        [
            b'{"image_url": "' + b"A" * MAX_REST_BYTES + b'"}',
            b'{"a": [' + b"[],".ljust(3) * MAX_REST_BYTES + b"[]]}",
            b'{"a": [' + b'"",' * MAX_REST_BYTES + b'""]}',
            b'{"image" ' + b" " * MAX_REST_BYTES + b": [1]}",
            b'"' + b'\\"' * MAX_REST_BYTES + b'"',
        ],
        ids=lambda rest: repr(rest[:12]),
    )
    def test_too_much_beside_the_pictures_is_refused(self, rest: bytes) -> None:
        error = error_of(rest)
        assert isinstance(error, RequestTooLarge)
        assert str(MAX_REST_BYTES) in str(error)

    @settings(max_examples=300, deadline=None)
    @given(
        fields=st.dictionaries(
            st.sampled_from(["prompt", "image", "mask", "image_b64", "options", "requests", 'a"image']),
            st.recursive(
                st.none() | st.booleans() | st.integers(-1, 256) | st.text(max_size=8) | st.just("image"),
                lambda inner: (
                    st.lists(inner | st.integers(0, 255), max_size=4)
                    | st.dictionaries(st.sampled_from(["image", "mask", "x"]), inner, max_size=3)
                ),
                max_leaves=8,
            ),
        ),
        layout=st.sampled_from(sorted(LAYOUTS)),
        damage=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(list(b'"\\[]{},: 1x\xff'))), max_size=2),
    )
    def test_a_damaged_body_is_told_or_decodes_as_the_standard_library_says(
        self, fields: dict[str, object], layout: str, damage: list[tuple[int, int]]
    ) -> None:
        body = bytearray(LAYOUTS[layout](fields).encode())
        for place, byte in damage:
            body[place % len(body)] = byte
        try:
            got = decode(body)
        except Img2ImgError:
            return
        assert _with_lists(got) == json.loads(body)


def _with_lists(value: object) -> object:
    match value:
        case bytes():
            return list(value)
        case list():
            return [_with_lists(item) for item in value]
        case dict():
            return {name: _with_lists(item) for name, item in value.items()}
        case _:
            return value


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


class TestReading:
    async def test_chunks_are_joined(self) -> None:
        with ByteBudget(100).reserve() as share:
            assert await read_body(chunks(b"ab", b"", b"cd"), 4, share) == b"abcd"

    async def test_a_body_over_the_limit_is_refused_and_the_limit_named(self) -> None:
        with ByteBudget(100).reserve() as share, pytest.raises(RequestTooLarge, match="at most 4 bytes"):
            await read_body(chunks(b"ab", b"cde"), 4, share)

    async def test_a_declared_length_is_judged_before_anything_is_read(self) -> None:
        read: list[bytes] = []

        async def body() -> AsyncIterator[bytes]:
            read.append(b"abcde")
            yield read[0]

        with ByteBudget(100).reserve() as share, pytest.raises(RequestTooLarge):
            await read_body(body(), 4, share, content_length=5)
        assert not read

    async def test_the_share_counts_the_body_and_what_it_decodes_to(self) -> None:
        budget = ByteBudget(100)
        with budget.reserve() as share:
            await read_body(chunks(b"a" * 10, b"b" * 10), 50, share)
            assert budget.in_use == 20 * DECODE_FACTOR
        assert budget.in_use == 0

    async def test_only_what_has_arrived_of_a_declared_length_is_reserved(self) -> None:
        budget = ByteBudget(100)

        async def body() -> AsyncIterator[bytes]:
            assert budget.in_use == 0
            yield b"a" * 5
            assert budget.in_use == 5 * DECODE_FACTOR
            yield b"a" * 15

        with budget.reserve() as share:
            await read_body(body(), 50, share, content_length=20)
            assert budget.in_use == 20 * DECODE_FACTOR

    async def test_beyond_the_budget_the_sender_is_asked_to_wait(self) -> None:
        budget = ByteBudget(100)
        with budget.reserve() as first:
            await read_body(chunks(b"a" * 30), 50, first)
            with budget.reserve() as second, pytest.raises(TooManyBytesInFlight) as caught:
                await read_body(chunks(b"b" * 15, b"b" * 15), 50, second)
            assert caught.value.retry_after > 0
            assert budget.in_use == 30 * DECODE_FACTOR
        with budget.reserve() as again:
            assert len(await read_body(chunks(b"b" * 30), 50, again)) == 30
        assert budget.in_use == 0

    async def test_a_declared_length_that_cannot_be_held_now_is_refused_before_anything_is_read(self) -> None:
        budget = ByteBudget(100)
        with budget.reserve() as first, budget.reserve() as second:
            await read_body(chunks(b"a" * 30), 50, first)
            with pytest.raises(TooManyBytesInFlight):
                await read_body(chunks(), 50, second, content_length=30)

    async def test_a_body_that_never_fits_is_too_large_and_not_worth_a_retry(self) -> None:
        with ByteBudget(100).reserve() as share, pytest.raises(RequestTooLarge, match="IN_FLIGHT"):
            await read_body(chunks(b"a" * 51), 60, share)

    async def test_a_sender_that_breaks_off_gives_its_share_back(self) -> None:
        budget = ByteBudget(100)

        async def broken() -> AsyncIterator[bytes]:
            yield b"a" * 10
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError), budget.reserve() as share:
            await read_body(broken(), 50, share)
        assert budget.in_use == 0
