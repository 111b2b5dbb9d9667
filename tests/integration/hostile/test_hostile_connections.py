"""Connections and calls that are slow, broken or many: they are given up, and harm nobody else."""

import asyncio
import json
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import grpc
import httpx
import pytest
import redis
from hostile_helpers import resident_megabytes
from PIL import Image

from gateway.rest.context import unless_slow
from img2img.errors import ClientClosed
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import edge_error, encoded, is_picture, jobs_of, problem, run_path
from tests.stack import Gateway, Stack, eventually


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

    async def trickle(size: int, chunks: int = 1_000_000) -> AsyncIterator[bytes]:
        for _ in range(chunks):
            await asyncio.sleep(0.005)
            yield b"x" * size

    with pytest.raises(ClientClosed, match="too slowly"):
        _ = [chunk async for chunk in unless_slow(trickle(1), idle=1, rate=10_000)]
    longer_than_idle = 250
    good = trickle(1000, longer_than_idle)
    assert len([chunk async for chunk in unless_slow(good, idle=1, rate=10_000)]) == longer_than_idle


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


@pytest.mark.parametrize("header", ["origin", "host"])
def test_a_web_page_of_another_site_gets_nothing(client: httpx.Client, header: str) -> None:
    """Without keys, any page could have its visitor's browser make jobs here, which may cost money."""
    before = len(jobs_of(client))
    page = {header: {"origin": "https://evil.example", "host": "evil.example:8000"}[header]}
    body = '{"prompt": "x"}'
    problem(client.post("/v1/jobs", content=body, headers=page), 401, "missing_credentials")
    edge_error(client.post(run_path(), content=body, headers=page), 9106, 403, "missing_credentials")
    problem(client.get("/v1/jobs", headers=page), 401, "missing_credentials")
    problem(client.get("/v1/scaling/default", headers=page), 401, "missing_credentials")
    assert len(jobs_of(client)) == before


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
