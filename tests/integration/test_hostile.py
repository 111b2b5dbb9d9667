"""Input that is broken, huge or malicious: a clear error or the right result, little memory, and no 5xx."""

import asyncio
import json
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import redis
from PIL import Image

from gateway.rest.context import unless_slow
from img2img.errors import ClientClosed
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import encoded, is_picture, jobs_of, model_error, opened, picture, problem, run_path
from tests.parity_cases import animation, huge_header, turned
from tests.stack import Gateway, Stack, eventually

MAX_MEGABYTES = 600
BOUNDARY = "b"


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        gateway = stack.gateway()
        stack.worker(concurrency="2")
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture(autouse=True)
def unharmed(gateway: Gateway, client: httpx.Client) -> Iterator[None]:
    """After each test the gateway still makes pictures, has logged no defect and has stayed small."""
    yield
    assert is_picture(client.post(run_path(), content='{"prompt": "x"}'))
    assert [entry for entry in gateway.entries() if entry.get("level") in ("error", "critical")] == []
    assert peak_megabytes(gateway.pid) < MAX_MEGABYTES


def peak_megabytes(pid: int) -> int:
    """The most memory that the process ever had resident."""
    return _megabytes(pid, "VmHWM:")


def resident_megabytes(pid: int) -> int:
    return _megabytes(pid, "VmRSS:")


def _megabytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024


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


def test_bodies_that_never_come_leave_room_for_others(gateway: Gateway, client: httpx.Client) -> None:
    """What is announced and not sent takes nothing from the budget, however many announce the most."""
    large = {"prompt": "x", "image_b64": "A" * 1_000_000}
    with ExitStack() as announced:
        for _ in range(4):
            connection = announced.enter_context(socket.create_connection(address(gateway), timeout=30))
            connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 67108864\r\n\r\n")
            # The answer comes once the route asks for the body.
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            connection.sendall(b'{"prompt":')
        assert client.post("/v1/jobs", json=large).json()["code"] == "invalid_image"
        assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 202


async def test_a_silent_sender_is_given_up() -> None:
    """A body whose next byte takes too long ends the request, and with it its share of the budget."""

    async def silent() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    chunks = unless_slow(silent(), idle=0.01)
    assert await anext(chunks) == b"{"
    with pytest.raises(ClientClosed, match="send the request again"):
        await anext(chunks)


async def test_a_sender_of_single_bytes_is_given_up() -> None:
    """Coming always just before the silence would be too long does not help, and a good rate does."""

    async def trickle(size: int) -> AsyncIterator[bytes]:
        for _ in range(100):
            await asyncio.sleep(0.005)
            yield b"x" * size

    with pytest.raises(ClientClosed, match="too slowly"):
        _ = [chunk async for chunk in unless_slow(trickle(1), idle=0.1, rate=10_000)]
    assert len([chunk async for chunk in unless_slow(trickle(1000), idle=0.1, rate=10_000)]) == 100


# gRPC


def test_waiting_calls_hold_no_picture(stack: Stack) -> None:
    """Thirty calls of 6 MB each take little more memory than one, and none of the budget."""
    gateway = stack.gateway(queue="nobody")
    data = encoded(Image.frombytes("RGB", (1400, 1400), os.urandom(1400 * 1400 * 3)), compress_level=0)
    request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt="x", image=data))
    with gateway.client() as client, grpc.insecure_channel(gateway.grpc) as channel:
        stub = Img2ImgServiceStub(channel)
        calls: list[Any] = []

        def wait_in_one_more_call() -> None:
            calls.append(stub.Generate.future(request, timeout=120))
            eventually(lambda: client.get("/v1/queue").json()["queued"] == len(calls), "the job is there")

        for _ in range(5):
            wait_in_one_more_call()
        before = resident_megabytes(gateway.pid)
        for _ in range(25):
            wait_in_one_more_call()
        eventually(lambda: resident_megabytes(gateway.pid) < before + 60, "the memory of 25 pictures is free")
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()


def test_a_job_keeps_no_baggage(client: httpx.Client, valkey_url: str) -> None:
    """It comes from anybody, and would be stored with every job."""
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "baggage": "user=secret"}
    job_id = client.post("/v1/jobs", json={"prompt": "x"}, headers=headers).json()["id"]
    with redis.Redis.from_url(valkey_url) as server:
        (record,) = [key for key in server.keys(f"*{job_id}*") if server.type(key) == b"hash"]
        spec = json.loads(server.hget(record, "spec"))
    assert list(spec["trace"]) == ["traceparent"]


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


# Connections and headers


def address(gateway: Gateway) -> tuple[str, int]:
    host, _, port = gateway.http.removeprefix("http://").partition(":")
    return host, int(port)


def raw(gateway: Gateway, request: bytes) -> bytes:
    """Send bytes as they are, end the sending side, and read what comes back."""
    with socket.create_connection(address(gateway), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


HEAD = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n{}",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        HEAD + b"X: " + b"y" * 50_000 + b"\r\n\r\n",
        HEAD + b"X\0Y: z\r\n\r\n",
    ],
    ids=["TLS", "no version", "HTTP/2", "negative", "huge", "two lengths", "two framings", "bad chunk", "big", "zero"],
)
def test_broken_http_is_refused(gateway: Gateway, request_: bytes) -> None:
    """4xx or a closed connection, never a job."""
    answer = raw(gateway, request_)
    assert answer == b"" or answer.split(b" ", 2)[1][:1] == b"4", answer[:200]


@pytest.mark.parametrize(
    "begin",
    [HEAD + b"X: ", b"GET /", HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: "],
    ids=["a header", "an address", "a trailer"],
)
def test_a_request_without_an_end_is_cut_off(gateway: Gateway, begin: bytes) -> None:
    """What the server keeps of a request before its route has a say is little, however much is sent."""
    with socket.create_connection(address(gateway), timeout=30) as connection:
        connection.sendall(begin)
        with pytest.raises(ConnectionError):
            connection.sendall(b"y" * 64_000_000)


def test_a_body_that_breaks_off_is_no_job(gateway: Gateway, client: httpx.Client) -> None:
    """Half of a request asks for nothing, even where the half would be valid JSON."""
    before = len(jobs_of(client))
    body = b'{"prompt":"x"}'
    answer = raw(gateway, HEAD + f"Content-Length: {len(body) + 10}\r\n\r\n".encode() + body)
    assert answer == b"" or b" 202 " not in answer.splitlines()[0]
    assert len(jobs_of(client)) == before


def test_requests_of_one_connection_share_no_trace(gateway: Gateway, client: httpx.Client) -> None:
    """The second is sent before the first is answered, and is nobody's child all the same."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    order = HEAD + b"Content-Length: 14\r\n"
    traced = f"traceparent: 00-{trace_id}-b7ad6b7169203331-01\r\n".encode()
    with socket.create_connection(address(gateway), timeout=30) as connection, connection.makefile("rb") as answers:
        connection.sendall(order + traced + b'\r\n{"prompt":"1"}' + order + b'Connection: close\r\n\r\n{"prompt":"2"}')
        assert answers.read().count(b"HTTP/1.1 202 ") == 2
    assert [job["trace_id"] for job in jobs_of(client)[:2]] == [None, trace_id]


def test_many_idle_connections_do_no_harm(gateway: Gateway, client: httpx.Client) -> None:
    """Connections that never finish their headers wait without holding up anybody."""
    with ExitStack() as idle:
        for _ in range(200):
            connection = idle.enter_context(socket.create_connection(address(gateway), timeout=30))
            connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost:")
        assert is_picture(client.post(run_path(), content='{"prompt": "x"}'))


def test_connections_are_not_bounded_by_the_usual_number_of_files(stack: Stack) -> None:
    """A process may have 1,024 files open unless it asks for more; here as few as 256, so that it is quick."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, usual[1]))
    try:
        gateway = stack.gateway()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    with ExitStack() as idle, gateway.client() as client:
        for _ in range(300):
            idle.enter_context(socket.create_connection(address(gateway), timeout=30))
        assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": b"Bearer \xff\xfe"},
        {"authorization": "Bearer " + "x" * 10_000},
        {"x-auth-key": "'; DROP TABLE tenants; --"},
        {"x-stainless-retry-count": "9" * 5000},
        {"x-stainless-retry-count": "²".encode()},
        {"idempotency-key": b"\xff" * 255},
        {"traceparent": "00-zz-zz-zz"},
        {"x-forwarded-for": "127.0.0.1," * 500},
        {"content-encoding": "gzip"},
        {"range": "bytes=0-1"},
        {"cookie": "a=" + "b" * 10_000},
        {"host": "elsewhere"},
        {"expect": "100-continue"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_odd_headers_change_nothing(client: httpx.Client, headers: dict[str, Any]) -> None:
    """What the service does not know, or cannot make sense of, it does not act upon."""
    assert is_picture(client.post(run_path(), content='{"prompt": "x"}', headers=headers))


@pytest.mark.parametrize("value", ["wait=-1", "wait", "wait=x", "wait=" + "9" * 400, "=;,=", "wait=1e999"])
def test_odd_preferences_are_ignored(client: httpx.Client, value: str) -> None:
    """A preference is a wish: one that makes no sense is none, and none waits for ever."""
    answer = client.post("/v1/jobs", json={"prompt": "x"}, headers={"prefer": value})
    assert answer.status_code in (200, 202)


@pytest.mark.parametrize("job", ["%00", "%ff", "..%2f..", "{0}", "x" * 5000, "a%0d%0aX:%20y", "0-*", "%F0%9F%A6%81"])
def test_odd_job_ids_are_no_jobs(client: httpx.Client, job: str) -> None:
    """404, whatever the id would mean to a file system, to the queue server or in a header."""
    for route in ("", "/events", "/image"):
        assert client.get(f"/v1/jobs/{job}{route}").status_code == 404
