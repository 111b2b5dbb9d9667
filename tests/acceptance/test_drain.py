"""A gateway that is told to stop: both ports close at once, and who still waits is asked to come again."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from redis import Redis

from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import jobs_of, model_error, problem, run_path
from tests.stack import Stack, eventually, state_of, submit

LIMIT = 8.0


def unfinished_call(http: str) -> socket.socket:
    """A connection whose request has begun and does not end."""
    host, port = http.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    return connection


def test_both_ports_close_at_once_and_waiting_calls_end_before_the_limit(stack: Stack) -> None:
    """``Generate`` gets UNAVAILABLE; no new job is taken; the job of the call is there for its retry."""
    leaving, staying = stack.gateway(drain_timeout=f"{LIMIT:g}"), stack.gateway()
    request = pb.GenerateRequest(request=pb.Img2ImgRequest(prompt="fake:step=60"), idempotency_key="deploy")
    with (
        staying.client() as client,
        grpc.insecure_channel(leaving.grpc) as channel,
        ThreadPoolExecutor() as pool,
        unfinished_call(leaving.http),
    ):
        stub = Img2ImgServiceStub(channel)
        waiting = pool.submit(stub.Generate, request, timeout=60)
        (job,) = eventually(lambda: jobs_of(client), "the job is there")
        leaving.signal(signal.SIGTERM)
        with grpc.insecure_channel(leaving.grpc) as other:

            def refused() -> bool:
                with pytest.raises(grpc.RpcError) as caught:
                    Img2ImgServiceStub(other).GetJob(pb.GetJobRequest(id="none"), timeout=5)
                return caught.value.code() == grpc.StatusCode.UNAVAILABLE

            eventually(refused, "the gRPC port is closed while HTTP drains", LIMIT / 2)
        with pytest.raises(grpc.RpcError) as caught:
            waiting.result()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "send the same request again" in caught.value.details()
        assert leaving.wait() == 0
        assert [entry for entry in leaving.entries() if entry.get("level") == "error"] == []
        assert state_of(client, job["id"]) == "queued"
        client.post(f"/v1/jobs/{job['id']}/cancel")


def test_a_waiting_cloudflare_call_is_asked_to_come_again(stack: Stack) -> None:
    """503 in Cloudflare's envelope with ``Retry-After``, and the job is there for the retry."""
    leaving, staying = stack.gateway(drain_timeout="2"), stack.gateway()
    with leaving.client() as one, staying.client() as two, ThreadPoolExecutor() as pool:
        prompt = "a dog that waits fake:step=60"
        waiting = pool.submit(one.post, run_path(), json={"prompt": prompt})

        def mine() -> list[str]:
            return [job["id"] for job in jobs_of(two) if job["parameters"]["prompt"] == prompt]

        (job_id,) = eventually(mine, "the job is there")
        leaving.signal(signal.SIGTERM)
        answer = waiting.result()
        assert leaving.wait() == 0
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert answer.json()["success"] is False
        assert state_of(two, job_id) == "queued"
        two.post(f"/v1/jobs/{job_id}/cancel")


def test_a_body_that_still_arrives_is_answered_before_the_limit(stack: Stack) -> None:
    """503 with ``Retry-After`` instead of a connection that breaks."""
    gateway = stack.gateway(drain_timeout="1")
    with gateway.client() as client:
        with unfinished_call(gateway.http) as slow:
            assert client.get("/health/live").status_code == 200
            gateway.signal(signal.SIGTERM)
            answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after:" in answer.lower()
        assert gateway.wait() == 0
        assert [entry for entry in gateway.entries() if entry.get("level") == "error"] == []


def test_calls_stuck_on_a_silent_server_are_asked_to_come_again(stack: Stack, valkey_url: str) -> None:
    """At the drain limit both dialects answer 503, each in its own form, and event streams end as they should."""
    leaving = stack.gateway(drain_timeout="0.5")
    with leaving.client() as client, ThreadPoolExecutor() as pool, Redis.from_url(valkey_url) as redis:
        job_id = submit(client, prompt="a dog")["id"]
        with client.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "id: 1"
            redis.client_pause(30_000, all=False)
            native = pool.submit(client.post, "/v1/jobs", json={"prompt": "a dog"})
            cloudflare = pool.submit(client.post, run_path(), json={"prompt": "a dog"})
            # Both calls, and the upkeep.
            eventually(lambda: redis.info("clients")["blocked_clients"] == 3, "both calls wait for the server")
            redis.client_pause(4000, all=True)
            leaving.signal(signal.SIGTERM)
            assert "shutting down" in problem(native.result(), 503, "unavailable")
            assert native.result().headers["retry-after"] == "1"
            assert "shutting down" in model_error(cloudflare.result(), 3043, 503, "unavailable")
            assert not any(line.startswith("id:") for line in lines)
    assert leaving.wait() == 0
    assert [entry["event"] for entry in leaving.entries() if "exception" in entry] == []
