"""A task on its way to the upstream, and the picture on its way back."""

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from img2img.requests import build_request
from worker.engines.base import Pictures, Task
from worker.engines.cloudflare.bodies import ImageForm, encode_body
from worker.engines.cloudflare.exchange import MAX_ANSWER, Answer
from worker.engines.cloudflare.pictures import NoPicture, read_picture

SIZE = (96, 64)
PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json; charset=utf-8"}


def task_of(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "prompt": "a lion, Löwe 🦁",
        "negative_prompt": "",
        "width": 512,
        "height": 256,
        "num_steps": 12,
        "strength": 0.75,
        "guidance": 3.5,
        "seed": 2**53 - 1,
    }
    return Task(**{**fields, **changes})


def body_of(task: Task, pictures: Pictures, form: ImageForm = "base64") -> dict[str, Any]:
    body: dict[str, Any] = json.loads(encode_body(task, pictures, form))
    build_request(body)  # the published schema takes it
    return body


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def encoded(form: str, picture: Image.Image | None = None, **how: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or Image.linear_gradient("L").convert("RGB").resize(SIZE)).save(buffer, form, **how)
    return buffer.getvalue()


class TestBodies:
    def test_text_alone(self) -> None:
        """Every field as it is; strength means nothing without a picture."""
        assert body_of(task_of(), Pictures()) == {
            "prompt": "a lion, Löwe 🦁",
            "width": 512,
            "height": 256,
            "num_steps": 12,
            "guidance": 3.5,
            "seed": 2**53 - 1,
        }

    def test_a_negative_prompt_goes_with_it(self) -> None:
        assert body_of(task_of(negative_prompt="blurry"), Pictures())["negative_prompt"] == "blurry"

    @pytest.mark.parametrize("form", ["base64", "integers"])
    def test_a_picture_goes_in_the_form_that_was_asked_for(self, form: ImageForm) -> None:
        """At the size of the task, every pixel as it is."""
        picture = Image.radial_gradient("L").convert("RGB").resize((512, 256))
        body = body_of(task_of(), Pictures(picture), form)
        assert body["strength"] == 0.75
        assert ("image_b64" in body, "image" in body) == (form == "base64", form == "integers")
        sent = base64.b64decode(body["image_b64"]) if form == "base64" else bytes(body["image"])
        assert decoded(sent).format == "PNG"
        assert decoded(sent).tobytes() == picture.tobytes()

    def test_a_picture_of_another_size_is_scaled(self) -> None:
        body = body_of(task_of(), Pictures(Image.new("RGB", (2048, 2048), "red")))
        assert decoded(base64.b64decode(body["image_b64"])).size == (512, 256)

    def test_a_mask_is_always_integers_and_black_or_white(self) -> None:
        mask = Image.new("L", (100, 50), 0)
        mask.paste(255, (50, 0, 100, 50))
        body = body_of(task_of(), Pictures(Image.new("RGB", (100, 50)), mask))
        sent = decoded(bytes(body["mask"]))
        assert (sent.mode, sent.size) == ("L", (512, 256))
        assert {value for _, value in sent.getcolors() or ()} == {0, 255}


class TestPictures:
    @pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "IMAGE/PNG; x=y", "application/octet-stream", ""])
    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
    def test_the_first_bytes_decide_whatever_the_label(self, form: str, kind: str) -> None:
        picture = read_picture(Answer(200, {"content-type": kind}, encoded(form)), SIZE)
        assert (picture.mode, picture.size) == ("RGB", SIZE)

    @pytest.mark.parametrize("content", [{"result": {"image": "{}"}, "errors": []}, {"image": "{}"}])
    @pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
    def test_base64_in_json(self, content: dict[str, Any], prefix: str) -> None:
        body = json.dumps(content).replace("{}", prefix + base64.b64encode(encoded("PNG")).decode())
        assert read_picture(Answer(200, JSON, body.encode()), SIZE).size == SIZE

    @pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "I;16"])
    def test_any_mode_becomes_rgb(self, mode: str) -> None:
        picture = Image.linear_gradient("L").resize(SIZE).convert("I;16" if mode == "I;16" else mode)
        assert read_picture(Answer(200, PNG, encoded("PNG", picture)), SIZE).mode == "RGB"

    @pytest.mark.parametrize(
        ("headers", "body", "words"),
        [
            (PNG, b"", "bytes of no known picture format"),
            (PNG, b"GIF89a" + bytes(99), "bytes of no known picture format"),
            (PNG, encoded("PNG")[:80], "a damaged picture"),
            (PNG, encoded("JPEG")[:300], "a damaged picture"),
            (PNG, b"\x89PNG\r\n\x1a\n" + bytes(99), "a damaged picture"),
            (PNG, encoded("PNG", Image.new("RGB", (64, 96))), "a picture of 64x96 instead of 96x64"),
            (PNG, bytes(MAX_ANSWER + 1), f"more than {MAX_ANSWER} bytes"),
            ({"content-type": "text/html"}, encoded("PNG"), "an answer of the type 'text/html'"),
            (JSON, b"", "JSON without an image"),
            (JSON, b"null", "JSON without an image"),
            (JSON, b'{"a": ' * 100_000, "JSON without an image"),
            (JSON, b"[1]", "JSON without an image"),
            (JSON, b'{"result": {"image": 1}}', "JSON without an image"),
            (JSON, b'{"result": {"image": "not base64!"}}', "an image that is not base64"),
            (JSON, b'{"image": "AAAA"}', "bytes of no known picture format"),
            (JSON, encoded("PNG"), "JSON without an image"),
        ],
        ids=lambda value: repr(value)[:24],
    )
    def test_anything_else_is_none(self, headers: dict[str, str], body: bytes, words: str) -> None:
        with pytest.raises(NoPicture) as caught:
            read_picture(Answer(200, headers, body), SIZE)
        assert str(caught.value) == words
