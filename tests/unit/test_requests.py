"""The one request model: Cloudflare's checks in Cloudflare's words, then the rules that it leaves out."""

import base64
import io
import math
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from img2img.errors import InvalidImage, InvalidRequest
from img2img.images import PictureInfo, PictureLimits
from img2img.requests import (
    Img2ImgRequest,
    JobOptions,
    OutputFormat,
    RequestLimits,
    Sampler,
    build_request,
    draw_seed,
)

GUIDANCE = "'/guidance' must be between 0 and 50"
FORMATS = "PNG, JPEG, WEBP, GIF or BMP file"
SEED = "'/seed' must be between 0 and 18446744073709551615"


def picture(width: int = 64, height: int = 48, colour: str = "red", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


PICTURE = picture()
OTHER = picture(colour="blue")


def reason(body: object, options: object = None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        build_request(body, options)
    return str(caught.value)


class TestCloudflaresChecks:
    """The table of 5006 reasons, run against Cloudflare's own validator."""

    @pytest.mark.parametrize("body", [{}, None, [], ["prompt"], "x", 5, True, {"Prompt": "x"}])
    def test_a_body_without_prompt(self, body: object) -> None:
        assert reason(body) == "required properties at '/' are 'prompt'"

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"prompt": ""}, "Length of '/prompt' must be >= 1 not met"),
            ({"prompt": 1}, "Type mismatch of '/prompt', 'string' not in 'number','integer'"),
            ({"prompt": None}, "Type mismatch of '/prompt', 'string' not in 'null'"),
            ({"prompt": ["a"]}, "Type mismatch of '/prompt', 'string' not in 'array','binary'"),
            ({"negative_prompt": {}}, "Type mismatch of '/negative_prompt', 'string' not in 'object'"),
            ({"num_steps": 21}, "'/num_steps' must be <= 20"),
            ({"num_steps": 2.5}, "Type mismatch of '/num_steps', 'integer' not in 'number'"),
            ({"num_steps": "20"}, "Type mismatch of '/num_steps', 'integer' not in 'string'"),
            ({"num_steps": True}, "Type mismatch of '/num_steps', 'integer' not in 'boolean'"),
            ({"num_steps": math.inf}, "Type mismatch of '/num_steps', 'integer' not in 'number'"),
            ({"width": 100}, "'/width' must be >= 256"),
            ({"width": 2049}, "'/width' must be <= 2048"),
            ({"height": 255}, "'/height' must be >= 256"),
            ({"height": 2048.5}, "Type mismatch of '/height', 'integer' not in 'number'"),
            ({"image": "abc"}, "Type mismatch of '/image', 'array' not in 'string'"),
            ({"image": {"0": 1}}, "Type mismatch of '/image', 'array' not in 'object'"),
            ({"image": None}, "Type mismatch of '/image', 'array' not in 'null'"),
            ({"mask": 5}, "Type mismatch of '/mask', 'array' not in 'number','integer'"),
            ({"image_b64": [1]}, "Type mismatch of '/image_b64', 'string' not in 'array','binary'"),
            ({"image_b64": [[1]]}, "Type mismatch of '/image_b64', 'string' not in 'array'"),
            ({"image_b64": b"x"}, "Type mismatch of '/image_b64', 'string' not in 'array','binary'"),
            ({"guidance": None}, "Type mismatch of '/guidance', 'number' not in 'null'"),
            ({"strength": "1"}, "Type mismatch of '/strength', 'number' not in 'string'"),
            ({"seed": 1.5}, "Type mismatch of '/seed', 'integer' not in 'number'"),
        ],
    )
    def test_a_field_of_the_wrong_kind(self, fields: dict[str, object], expected: str) -> None:
        assert reason({"prompt": "x"} | fields) == expected

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ({"num_steps": 30, "width": 1}, "'/width' must be >= 256"),
            ({"seed": "x", "guidance": "x", "prompt": ""}, "Length of '/prompt' must be >= 1 not met"),
            ({"guidance": None}, "Type mismatch of '/guidance', 'number' not in 'null'"),
            ({"prompt": "x", "strength": 2, "seed": "x"}, "Type mismatch of '/seed', 'integer' not in 'string'"),
        ],
    )
    def test_only_the_first_error_is_told_in_the_schemas_order(self, body: object, expected: str) -> None:
        """Whatever the order of the body; a missing prompt comes last, and our own rules after the schema's."""
        assert reason(body) == expected

    def test_a_whole_number_may_be_written_as_a_float(self) -> None:
        request = build_request({"prompt": "x", "num_steps": 20.0, "width": 512.0, "seed": 7.0}).request
        assert (request.num_steps, request.width, request.seed) == (20, 512, 7)
        assert {type(value) for value in (request.num_steps, request.width, request.seed)} == {int}


class TestOurRules:
    """What Cloudflare's schema lets through and the service cannot do."""

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"num_steps": 0}, "'/num_steps' must be >= 1"),
            ({"num_steps": -3}, "'/num_steps' must be >= 1"),
            ({"num_steps": -(10**400)}, "'/num_steps' must be >= 1"),
            ({"strength": 2}, "'/strength' must be between 0 and 1"),
            ({"strength": -1}, "'/strength' must be between 0 and 1"),
            ({"strength": math.nan}, "'/strength' must be between 0 and 1"),
            ({"strength": 10**400}, "'/strength' must be between 0 and 1"),
            ({"guidance": 50.1}, GUIDANCE),
            ({"guidance": -0.1}, GUIDANCE),
            ({"guidance": math.nan}, GUIDANCE),
            ({"guidance": -math.inf}, GUIDANCE),
            ({"guidance": 10**400}, GUIDANCE),
            ({"guidance": -(10**400)}, GUIDANCE),
            ({"seed": -1}, SEED),
            ({"seed": 2**64}, SEED),
            ({"seed": 1e300}, SEED),
            ({"image": [256, -1]}, "'/image/0' must be an integer between 0 and 255"),
            ({"image": [0, -1]}, "'/image/1' must be an integer between 0 and 255"),
            ({"image": ["a"]}, "'/image/0' must be an integer between 0 and 255"),
            ({"image": [1, 1.5]}, "'/image/1' must be an integer between 0 and 255"),
            ({"image": [True]}, "'/image/0' must be an integer between 0 and 255"),
            ({"image": [1, None]}, "'/image/1' must be an integer between 0 and 255"),
            ({"image": [math.nan]}, "'/image/0' must be an integer between 0 and 255"),
            ({"image": [math.inf]}, "'/image/0' must be an integer between 0 and 255"),
            ({"image": [[1], 2]}, "'/image/0' must be an integer between 0 and 255"),
            ({"image": []}, "'/image' is empty: send the bytes of an image file"),
            ({"image": b"text"}, "'/image' is not an image: send the bytes of a " + FORMATS),
            ({"image": PICTURE, "mask": [-1]}, "'/mask/0' must be an integer between 0 and 255"),
            ({"image": PICTURE, "mask": b"x"}, "'/mask' is not an image: send the bytes of a " + FORMATS),
            ({"image": PICTURE, "image_b64": "QQ=="}, "'/image' and '/image_b64' are both given: send one of them"),
            ({"mask": PICTURE}, "'/mask' needs '/image' or '/image_b64': send the picture that it masks"),
            (
                {"image": PICTURE, "num_steps": 4, "strength": 0.2},
                "'/strength' times '/num_steps' must be at least one step: raise one of them",
            ),
            ({"prompt": "a\ud800"}, "'/prompt' must be valid Unicode, without lone surrogates"),
            ({"negative_prompt": "\udfff"}, "'/negative_prompt' must be valid Unicode, without lone surrogates"),
        ],
    )  # fmt: skip
    def test_each_has_a_reason_that_names_the_field(self, fields: dict[str, object], expected: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            build_request({"prompt": "x"} | fields)
        assert str(caught.value) == expected
        assert f"/{caught.value.field}" in expected

    @pytest.mark.parametrize(
        "fields",
        [
            {"num_steps": 1},
            {"strength": 0},
            {"strength": 1},
            {"guidance": 0},
            {"guidance": 50},
            {"seed": 0},
            {"seed": 2**64 - 1},
            {"negative_prompt": ""},
            {"image": PICTURE, "num_steps": 20, "strength": 0.05},
            {"image": list(PICTURE), "mask": list(PICTURE)},
            {"options": {"rejectIfBusy": True}, "external_reference": "mine"},
        ],
        ids=lambda fields: str(fields)[:30],
    )
    def test_the_ends_of_each_range_are_inside(self, fields: dict[str, object]) -> None:
        assert build_request({"prompt": "x"} | fields).warnings == ()

    def test_unknown_fields_are_accepted_and_noted(self) -> None:
        warnings = build_request({"prompt": "x", "strenght": 0.5}).warnings
        assert warnings == ("unknown field 'strenght' was ignored",)

    def test_prompts_are_bounded_in_bytes(self) -> None:
        limits = RequestLimits(prompt_bytes=8)
        build_request({"prompt": "üüüü"}, limits=limits)
        for field in ("prompt", "negative_prompt"):
            with pytest.raises(InvalidRequest) as caught:
                build_request({"prompt": "x", field: "üüüü."}, limits=limits)
            assert str(caught.value) == f"Length of '/{field}' must be <= 8 bytes"

    @pytest.mark.parametrize(
        ("asked", "got"), [(256, 256), (257, 256), (259, 256), (260, 264), (513, 512), (1020, 1024), (2047, 2048)]
    )
    def test_sizes_are_rounded_to_a_multiple_of_8_and_the_user_is_told(self, asked: int, got: int) -> None:
        checked = build_request({"prompt": "x", "width": asked, "height": asked})
        assert (checked.request.width, checked.request.height) == (got, got)
        told = tuple(f"{side} {asked} was rounded to {got}, a multiple of 8" for side in ("height", "width"))
        assert checked.warnings == (told if asked != got else ())

    def test_a_mask_of_another_size_is_taken_with_a_warning(self) -> None:
        checked = build_request({"prompt": "x", "image": PICTURE, "mask": picture(32, 32)})
        assert checked.warnings == ("mask 32x32 was resized to the image's 64x48",)

    def test_a_mask_is_compared_with_the_upright_picture(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        body = {"prompt": "x", "image": picture(exif=exif), "mask": picture(48, 64)}
        assert build_request(body).warnings == ()

    def test_the_limits_on_pictures_are_settings(self) -> None:
        for limits in (PictureLimits(file_bytes=10), PictureLimits(side=32)):
            with pytest.raises(InvalidImage):
                build_request({"prompt": "x", "image": PICTURE}, limits=RequestLimits(pictures=limits))


class TestPictures:
    @pytest.mark.parametrize(
        "image",
        [
            {"image": PICTURE},
            {"image": list(PICTURE)},
            {"image": [float(item) for item in PICTURE]},
            {"image_b64": base64.b64encode(PICTURE).decode()},
            {"image_b64": base64.urlsafe_b64encode(PICTURE).decode()},
            {"image_b64": base64.b64encode(PICTURE).decode().rstrip("=")},
            {"image_b64": base64.encodebytes(PICTURE).decode().replace("\n", "\r\n")},
            {"image_b64": f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"},
            {"image_b64": f" {base64.b64encode(PICTURE).decode()}\n"},
        ],
        ids=lambda image: str(image)[:34],
    )
    def test_every_spelling_is_the_same_request(self, image: dict[str, object]) -> None:
        checked = build_request({"prompt": "x"} | image)
        assert checked.request.image == PICTURE
        assert checked.parameters.image == PictureInfo("PNG", 64, 48, len(PICTURE), sha256(PICTURE).hexdigest())
        assert checked.fingerprint() == build_request({"prompt": "x", "image": PICTURE}).fingerprint()

    @settings(max_examples=50, deadline=None)
    @given(data=st.binary(max_size=100), variant=st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))
    def test_base64_of_any_bytes_is_decoded(self, data: bytes, variant: Any) -> None:
        """What is told is that the bytes are no picture, never that the text is no base64."""
        assert "base64" not in reason({"prompt": "x", "image_b64": variant(data).decode()})

    @pytest.mark.parametrize("text", ["a", "abcde", "ab$d", "Zm9v=Zm9v", "ÄÖÜ=", "\x00\x00\x00\x00", "data:,a"])
    def test_other_text_is_no_base64(self, text: str) -> None:
        assert reason({"prompt": "x", "image_b64": text}).startswith("'/image_b64' is not base64: ")

    @pytest.mark.parametrize("text", ["", "=", "data:image/png;base64,", "data:"])
    def test_empty_base64_is_an_empty_picture(self, text: str) -> None:
        assert "is empty" in reason({"prompt": "x", "image_b64": text})

    def test_inputs_are_stored_only_where_there_are_any(self) -> None:
        assert build_request({"prompt": "x"}).inputs is None
        inputs = build_request({"prompt": "x", "image": PICTURE, "mask": OTHER}).inputs
        assert inputs is not None
        assert (inputs.image, inputs.mask) == (PICTURE, OTHER)

    def test_what_is_recorded_has_no_bytes(self) -> None:
        recorded = msgspec.json.encode(build_request({"prompt": "x", "image": PICTURE}).parameters)
        assert len(recorded) < 300


class TestOptions:
    def test_none_given_are_the_defaults(self) -> None:
        assert build_request({"prompt": "x"}).options == JobOptions()

    def test_all_can_be_given(self) -> None:
        options = build_request(
            {"prompt": "x"},
            {
                "priority": -10,
                "deadline_seconds": 30,
                "sampler": "ddim",
                "output_format": "webp",
                "output_quality": 100,
                "reject_if_busy": True,
            },
        ).options
        assert options == JobOptions(
            priority=-10,
            deadline_seconds=30.0,
            sampler=Sampler.DDIM,
            output_format=OutputFormat.WEBP,
            output_quality=100,
            reject_if_busy=True,
        )

    @pytest.mark.parametrize("name", JobOptions.__struct_fields__)
    def test_one_of_another_type_is_told_what_it_must_be(self, name: str) -> None:
        assert reason({"prompt": "x"}, {name: []}).startswith(f"'/options/{name}' must be ")

    @pytest.mark.parametrize(
        ("options", "field", "expected"),
        [
            (5, "options", "'/options' must be an object"),
            ([], "options", "'/options' must be an object"),
            (
                {"prority": 1},
                "options",
                "'/options' has no 'prority': write one of priority, deadline_seconds",
            ),
            ({"priority": 11}, "options.priority", "must be between -10 and 10"),
            ({"priority": "1"}, "options.priority", "'/options/priority' must be an integer from -10 to 10"),
            ({"output_quality": 0}, "options.output_quality", "must be between 1 and 100"),
            ({"deadline_seconds": 0}, "options.deadline_seconds", "must be above 0 and at most 86400"),
            ({"deadline_seconds": 86401}, "options.deadline_seconds", "must be above 0 and at most 86400"),
            ({"deadline_seconds": math.nan}, "options.deadline_seconds", "must be above 0"),
            ({"sampler": "best"}, "options.sampler", "must be one of dpmpp_2m, ddim, euler, euler_a"),
            ({"output_format": "gif"}, "options.output_format", "must be one of png, webp, jpeg"),
            ({"not_before": "tomorrow"}, "options.not_before", "such as 2030-01-31T12:00:00Z"),
            ({"reject_if_busy": 1}, "options.reject_if_busy", "'/options/reject_if_busy' must be true or false"),
        ],
    )
    def test_a_wrong_one_is_named(self, options: object, field: str, expected: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            build_request({"prompt": "x"}, options)
        assert caught.value.field == field
        assert expected in str(caught.value)

    def test_every_output_format_has_a_media_type(self) -> None:
        assert [item.media_type for item in OutputFormat] == ["image/png", "image/webp", "image/jpeg"]


VALID = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)},
    optional={
        "negative_prompt": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        "height": st.integers(32, 256).map(lambda side: side * 8),
        "width": st.integers(32, 256).map(lambda side: side * 8),
        "image": st.sampled_from([PICTURE, OTHER]),
        "num_steps": st.integers(2, 20),
        "strength": st.floats(0.5, 1),
        "guidance": st.floats(0, 50),
        "seed": st.integers(0, 2**64 - 1),
    },
)
CHANGES: dict[str, object] = {
    "prompt": "another prompt, longer than any",
    "negative_prompt": "another prompt, longer than any",
    "height": 1000.0,
    "width": 1000.0,
    "image": picture(65, 48),
    "mask": OTHER,
    "num_steps": 1,
    "strength": 0.25,
    "guidance": 33.25,
    "seed": 2**63 + 1,
}


class TestFingerprint:
    @settings(max_examples=50, deadline=None)
    @given(body=VALID)
    def test_equal_requests_have_equal_ones(self, body: dict[str, object]) -> None:
        """However they are written: order, defaults spelt out, whole numbers as floats."""
        defaults = {field.name: field.default for field in msgspec.structs.fields(Img2ImgRequest)}
        spelt = {name: value for name, value in defaults.items() if value not in (None, msgspec.NODEFAULT)} | body
        rewritten = {
            name: float(value) if isinstance(value, int) and value < 2**53 else value for name, value in spelt.items()
        }
        expected = build_request(body).fingerprint()
        assert build_request(dict(reversed(rewritten.items()))).fingerprint() == expected

    @settings(max_examples=50, deadline=None)
    @given(body=VALID, name=st.sampled_from(sorted(CHANGES)))
    def test_any_change_of_a_field_changes_it(self, body: dict[str, object], name: str) -> None:
        body |= {"image": body.get("image", PICTURE), "num_steps": 20}
        changed = body | {name: CHANGES[name]} | ({"strength": 1.0} if name == "num_steps" else {})
        assert build_request(changed).fingerprint() != build_request(body).fingerprint()

    @pytest.mark.parametrize("value", [1, 1.0])
    def test_a_number_has_one_however_it_is_written(self, value: float) -> None:
        assert build_request({"prompt": "x", "strength": value}).fingerprint() == (
            build_request({"prompt": "x"}).fingerprint()
        )
        assert build_request({"prompt": "x", "guidance": value}).fingerprint() == (
            build_request({"prompt": "x", "guidance": 1.0}).fingerprint()
        )

    def test_image_and_mask_are_not_mixed_up(self) -> None:
        one = build_request({"prompt": "x", "image": PICTURE, "mask": OTHER})
        other = build_request({"prompt": "x", "image": OTHER, "mask": PICTURE})
        assert one.fingerprint() != other.fingerprint()

    @pytest.mark.parametrize(
        "options", [{"priority": 1}, {"sampler": "euler"}, {"output_format": "jpeg"}, {"output_quality": 50}]
    )
    def test_options_are_part_of_it(self, options: dict[str, object]) -> None:
        assert build_request({"prompt": "x"}, options).fingerprint() != build_request({"prompt": "x"}).fingerprint()


def test_a_drawn_seed_survives_json_everywhere() -> None:
    """JavaScript holds integers up to 2^53."""
    assert all(0 <= draw_seed() < 2**32 for _ in range(100))
