"""Input that is broken, huge or malicious: a clear error or the right result, little memory, and no 5xx."""

import gzip
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.calls import encoded, is_picture, jobs_of, model_error, opened, picture, problem, run_path
from tests.parity_cases import animation, huge_header, turned
from tests.stack import Gateway

BOUNDARY = "b"


# Bodies


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


BODIES: list[tuple[str, bytes, int, str]] = [
    ("10 MB of nested arrays", b"[" * 10_000_000, 413, "request_too_large"),
    ("10 MB of nested arrays as a picture", b'{"prompt":"x","image":' + b"[" * 10_000_000, 400, "invalid_request"),
    ("10 MB of nested objects", b'{"a":' * 2_000_000, 413, "request_too_large"),
    ("nested arrays in a field", b'{"prompt":"x","a":' + deep(100_000) + b"}", 400, "malformed_body"),
    ("nested arrays as a number", b'{"prompt":"x","seed":' + deep(100_000) + b"}", 400, "malformed_body"),
    ("nested arrays in the options", b'{"prompt":"x","options":' + deep(100_000) + b"}", 400, "malformed_body"),
    ("1 MB prompt", b'{"prompt":"' + b"x" * 1_000_000 + b'"}', 413, "request_too_large"),
    ("escaped prompt", b'{"prompt":"' + rb"\u0041" * 80_000 + b'"}', 400, "invalid_request"),
    ("20 MB of one string", b'"' + b"x" * 20_000_000 + b'"', 413, "request_too_large"),
    ("20 MB of white space", b" " * 20_000_000, 400, "missing_body"),
    ("20 MB of commas in a picture", b'{"prompt":"x","image":[' + b"," * 20_000_000 + b"]}", 400, "malformed_body"),
    ("20 MB of digits", b'{"prompt":"x","image":[' + b"9" * 20_000_000 + b"]}", 400, "invalid_request"),
    ("NaN", b'{"prompt":"x","strength":NaN}', 400, "malformed_body"),
    ("infinity", b'{"prompt":"x","guidance":Infinity}', 400, "malformed_body"),
    ("1e400", b'{"prompt":"x","guidance":1e400}', 400, "invalid_request"),
    ("1e400 as a seed", b'{"prompt":"x","seed":1e400}', 400, "invalid_request"),
    ("1e400 in a picture", b'{"prompt":"x","image":[1e400]}', 400, "invalid_request"),
    ("100,000 digits", b'{"prompt":"x","seed":' + b"9" * 100_000 + b"}", 400, "invalid_request"),
    ("a lone surrogate", rb'{"prompt":"\ud800"}', 400, "malformed_body"),
    ("UTF-16", '{"prompt":"x"}'.encode("utf-16"), 400, "malformed_body"),
    ("a zero byte behind the end", b'{"prompt":"x"}\0', 400, "malformed_body"),
    ("a picture without an end", b'{"prompt":"x","image":[1,2,3', 400, "malformed_body"),
    ("a string without an end", b'{"prompt":"x', 400, "malformed_body"),
    ("only a quote", b'"', 400, "malformed_body"),
]


@pytest.mark.parametrize(("body", "status", "code"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_a_hostile_body_is_refused(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    """Refused on both routes with the same code, and a short message."""
    native = client.post("/v1/jobs", content=body)
    assert (native.status_code, native.json()["code"]) == (status, code)
    cloudflare = client.post(run_path(), content=body)
    assert (cloudflare.status_code, cloudflare.headers["img2img-error"]) == (status, code)
    assert max(len(native.content), len(cloudflare.content)) < 1000


def test_a_compressed_body_is_told_from_one_that_is_no_json(client: httpx.Client) -> None:
    """Its sender cannot know what is wrong with bytes that his library wrote."""
    body = gzip.compress(b'{"prompt":"x"}')
    answer = client.post("/v1/jobs", content=body, headers={"content-encoding": "gzip"})
    assert "send it as it is, without Content-Encoding" in problem(answer, 400, "malformed_body")


def test_many_unknown_fields_are_counted_not_listed(client: httpx.Client) -> None:
    """The job's warnings do not grow with what was sent."""
    fields = {f"field{number}" * 10: number for number in range(3000)}
    job = client.post("/v1/jobs", json={"prompt": "x"} | fields).json()
    assert len(job["warnings"]) == 6
    assert max(map(len, job["warnings"])) < 100


def noise() -> bytes:
    """A JSON body of 50 MB with a picture of 14 MB."""
    side = 2200
    data = encoded(Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)), compress_level=0)
    digits = [str(number).encode() for number in range(256)]
    pieces = (data[start : start + 100_000] for start in range(0, len(data), 100_000))
    return b'{"prompt":"x","image":[' + b",".join(b",".join([digits[byte] for byte in p]) for p in pieces) + b"]}"


def test_eight_large_bodies_at_once(gateway: Gateway, client: httpx.Client) -> None:
    """What does not fit into memory together is asked to come again; nothing is dropped, and nothing swells."""
    body = noise()
    assert len(body) > 50_000_000

    def send(_: int) -> httpx.Response:
        with gateway.client() as sender:
            return sender.post("/v1/jobs", content=body)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(8)))
    taken = [answer for answer in answers if answer.status_code == 202]
    for answer in answers:
        if answer.status_code != 202:
            problem(answer, 429, "too_many_bytes_in_flight")
            assert int(answer.headers["retry-after"]) >= 1
    assert taken
    assert send(0).status_code == 202
    for job in jobs_of(client):
        client.post(job["links"]["cancel"])


# Pictures

BAD_PICTURES: list[tuple[str, bytes, str]] = [
    ("100,000 x 100,000 pixels", huge_header(), "must be at most 4096x4096 pixels"),
    ("animated GIF", animation(), "is animated: send one still picture"),
    ("truncated JPEG", picture(512, 512, "JPEG")[:3000], "is cut off or damaged"),
    ("truncated PNG", picture(512, 512)[:-100], "is cut off or damaged"),
    ("PNG header alone", picture()[:40], ""),
    ("damaged PNG", picture()[:60] + b"\0" * 40 + picture()[100:], ""),
    ("text", b"GIF89a is what I am", ""),
    ("empty", b"", "is empty"),
]


@pytest.mark.parametrize("field", ["image", "mask"])
@pytest.mark.parametrize(("data", "reason"), [row[1:] for row in BAD_PICTURES], ids=[row[0] for row in BAD_PICTURES])
def test_a_bad_picture_is_refused(client: httpx.Client, data: bytes, reason: str, field: str) -> None:
    """Whether the gateway sees it or only the worker, the caller is told which picture and why."""
    answer = client.post(run_path(), json={"prompt": "x", "image": list(picture())} | {field: list(data)})
    message = model_error(answer, 3010, 400, "invalid_image")
    assert f"'/{field}' {reason}" in message


def kept(client: httpx.Client, data: bytes, **fields: Any) -> Image.Image:
    """What the service understood: a black mask keeps every pixel of the picture."""
    body = {"prompt": "x", "image": list(data), "mask": list(encoded(Image.new("L", (8, 8))))} | fields
    answer = client.post(run_path(), json=body)
    assert is_picture(answer)
    return opened(answer.content)


def test_a_16_bit_picture_keeps_its_greys(client: httpx.Client) -> None:
    """Scaled to 8 bit, not cut off at white."""
    result = kept(client, encoded(Image.new("I;16", (256, 256), 40_000)))
    assert result.getpixel((128, 128)) == (156, 156, 156)


def test_a_turned_photo_is_set_upright(client: httpx.Client) -> None:
    """What the camera's orientation says is done to the pixels, and to the size of the result."""
    data = turned()
    upright = opened(data).transpose(Image.Transpose.ROTATE_270)
    result = kept(client, data)
    assert upright.height > upright.width
    assert result.height > result.width
    expected = upright.resize(result.size)
    for point in ((10, 10), (result.width - 10, result.height - 10)):
        assert result.getpixel(point) == pytest.approx(expected.getpixel(point), abs=12)


def test_a_transparent_picture_stands_on_white(client: httpx.Client) -> None:
    """Not on whatever colour lies under the transparency."""
    assert kept(client, encoded(Image.new("RGBA", (256, 256), (255, 0, 0, 0)))).getpixel((9, 9)) == (255, 255, 255)


def test_a_thin_picture_keeps_within_the_sizes(client: httpx.Client) -> None:
    """A line of pixels becomes the widest legal picture."""
    assert kept(client, picture(4096, 1)).size == (2048, 256)


# Forms


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + end


def part(name: str, content: bytes, more: str = "") -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"{more}', content


PROMPT = part("prompt", b"x")
FORMS: list[tuple[str, bytes, int, str]] = [
    ("nothing", b"", 400, "malformed_body"),
    ("no parts", form(), 400, "invalid_request"),
    ("no end", form(PROMPT, end=b""), 400, "malformed_body"),
    ("another boundary", form(PROMPT).replace(b"--b", b"--c"), 400, "malformed_body"),
    ("bare line feeds", form(PROMPT).replace(b"\r\n", b"\n"), 400, "malformed_body"),
    ("no disposition", form(("Content-Type: text/plain", b"x")), 400, "malformed_body"),
    ("no name", form(("Content-Disposition: form-data", b"x")), 400, "invalid_request"),
    ("a huge header", form(part("prompt", b"x", "\r\nX: " + "y" * 100_000)), 400, "malformed_body"),
    ("many headers", form(part("prompt", b"x", "\r\nX: y" * 10_000)), 400, "malformed_body"),
    ("many parts", form(PROMPT, *[part("a", b"")] * 20_000), 400, "malformed_body"),
    ("not UTF-8", form(part("prompt", b"\xff\xfe")), 400, "malformed_body"),
    ("a slow charset", form(part("prompt", b"\xff" * 400_000, "\r\nContent-Type: text/plain; charset=idna")), 400,
     "malformed_body"),
    ("1 MB prompt", form(part("prompt", b"x" * 1_000_000)), 413, "request_too_large"),
    ("10 MB unknown field", form(PROMPT, part("junk", b"x" * 10_000_000)), 413, "request_too_large"),
    ("20 MB picture", form(PROMPT, part("image", b"x" * 20_000_000, '; filename="x"')), 400, "invalid_image"),
    ("a number in words", form(PROMPT, part("seed", b"five")), 400, "invalid_request"),
    ("a long number", form(PROMPT, part("seed", b"9" * 5000)), 400, "invalid_request"),
    ("nested options", form(PROMPT, part("options", deep(100_000))), 400, "invalid_request"),
    ("an option without a name", form(PROMPT, part("options.", b"1")), 400, "invalid_request"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code"), [row[1:] for row in FORMS], ids=[row[0] for row in FORMS])
def test_a_hostile_form_is_refused(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    """A form is bounded as JSON is, and its parts' own headers decide nothing."""
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = client.post("/v1/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    "boundary", ["", "; boundary=", '; boundary="', "; boundary=\xe4", "; boundary=" + "b" * 10_000]
)
def test_a_form_needs_its_boundary(client: httpx.Client, boundary: str) -> None:
    """Without a usable one the parts cannot be told apart."""
    headers = {"content-type": f"multipart/form-data{boundary}".encode("latin-1")}
    problem(client.post("/v1/jobs", content=form(PROMPT), headers=headers), 400, "malformed_body")
