"""Without its queue server the gateway says so in each dialect, and is there again when the server is."""

import os
import signal
from collections.abc import Iterator

import grpc
import httpx
import pytest
import redis

from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import is_picture, model_error, problem, run_path
from tests.stack import Gateway, Stack, eventually, submit


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        gateway = stack.gateway()
        stack.worker()
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        eventually(lambda: client.get("/health/ready").status_code == 200, "the gateway is ready")
        yield client


@pytest.fixture
def server_process(valkey_url: str) -> int:
    with redis.Redis.from_url(valkey_url) as server:
        return int(server.info("server")["process_id"])


@pytest.fixture
def unattended(stack: Stack) -> Gateway:
    """A gateway whose jobs stay queued."""
    return stack.gateway(queue="unattended")


def test_a_silent_server_makes_the_gateway_unready(client: httpx.Client, server_process: int) -> None:
    """A server that hangs is noticed within seconds; the process itself stays live, and recovers by itself."""
    os.kill(server_process, signal.SIGSTOP)
    try:
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "queue server silent"})
        assert client.get("/health/live").status_code == 200
    finally:
        os.kill(server_process, signal.SIGCONT)
    eventually(lambda: client.get("/health/ready").status_code == 200, "the server answers again")
    assert is_picture(client.post(run_path(), content='{"prompt": "x"}'))


def test_a_dead_server_is_503_everywhere(
    client: httpx.Client, gateway: Gateway, server_process: int, unattended: Gateway
) -> None:
    """Each front end says that it is not the caller's fault, and when to come again."""
    with unattended.client() as other:
        job_id = submit(other, prompt="x")["id"]
        with other.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "id: 1"
            os.kill(server_process, signal.SIGKILL)
            # The stream has begun, so it just ends: its caller connects again with the last number, and is told then.
            for _ in lines:
                pass
    assert [entry for entry in unattended.entries() if entry.get("level") == "error"] == []
    eventually(lambda: client.get("/health/ready").status_code == 503, "the server is gone")
    assert client.get("/health/live").status_code == 200
    for answer in (client.post("/v1/jobs", json={"prompt": "x"}), client.get("/v1/jobs"), client.get("/v1/queue")):
        problem(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    answer = client.post(run_path(), json={"prompt": "x"})
    model_error(answer, 3043, 503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    with grpc.insecure_channel(gateway.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        Img2ImgServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
