"""Connections of both clients: what breaks, what is resumed, who is trusted."""

import asyncio
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from client_helpers import AT, PICTURE, Caller, Servicer, happened, job, status
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.rpc import code_pb2, error_details_pb2

from img2img.client import (
    AsyncClient,
    Client,
    ClientError,
    Event,
    Failure,
)
from img2img.client.messages import LASTED, LONGEST_PAUSE, RESUME_TRIES, Progress
from img2img.v1 import img2img_pb2 as pb
from img2img.v1 import img2img_pb2_grpc


async def test_a_broken_call_is_repeated_with_its_key(call: Caller, servicer: Servicer) -> None:
    """After UNAVAILABLE the same call is made again, under the same idempotency key."""
    gone = status(code_pb2.UNAVAILABLE, "restarting")
    servicer.answers["create"] = [gone, gone, pb.CreateJobResponse(job=job())]
    assert (await call("create", prompt="x", image=PICTURE * 64)).id == "0-1"
    assert len({request.idempotency_key for request in servicer.asked}) == 1
    assert len(servicer.asked) == 3


async def test_watch_goes_on_where_it_broke(call: Caller, servicer: Servicer) -> None:
    """A stream that breaks or just ends is opened again after the last event seen, until the job has ended."""
    gone = status(code_pb2.UNAVAILABLE, "restarting")
    last = happened(4, pb.JOB_STATE_FAILED, error=pb.JobError(code="engine_failed", message="no luck"))
    servicer.answers["watch"] = [
        gone,
        [happened(2, stage="steps", step=1, steps=9), gone],
        [happened(3)],
        [last],
    ]
    events: list[Event] = await call("watch", "0-1", after=1)
    assert [event.sequence for event in events] == [2, 3, 4]
    assert [request.after for request in servicer.asked] == [1, 1, 2, 3]
    assert (events[0].stage, events[0].step, events[0].steps, events[0].at) == ("steps", 1, 9, AT)
    assert events[2].error == Failure("engine_failed", "no luck")


async def test_a_replayed_jobs_log_goes_on(call: Caller, servicer: Servicer) -> None:
    """A terminal event ends the watch only as the stream's last one, and only if the stream was not broken there."""
    gone = status(code_pb2.UNAVAILABLE, "restarting")
    failed, done = happened(2, pb.JOB_STATE_FAILED), happened(4, pb.JOB_STATE_SUCCEEDED)
    servicer.answers["watch"] = [[failed, happened(3, pb.JOB_STATE_QUEUED, replays=1)], [done, gone], []]
    events: list[Event] = await call("watch", "0-1", after=1)
    assert [(event.sequence, event.replays) for event in events] == [(2, None), (3, 1), (4, None)]
    assert [request.after for request in servicer.asked] == [1, 3, 4]


@pytest.mark.parametrize(("seconds", "tries"), [(LASTED, None), (LASTED - 1, RESUME_TRIES)])
def test_only_tries_in_a_row_are_counted(monkeypatch: pytest.MonkeyPatch, seconds: float, tries: int | None) -> None:
    """A proxy may end a silent stream once a minute, for as long as its job waits; a dead service is given up."""
    now = 1000.0
    monkeypatch.setattr("img2img.client.messages.time", SimpleNamespace(monotonic=lambda: now))
    progress, broken = Progress(0), ClientError("unavailable", "gone")
    progress.take(happened(1))
    paused = 0
    with pytest.raises(ClientError) if tries else nullcontext():
        for _ in range(100):
            progress.request("0-1")
            now += seconds
            assert progress.pause(broken) <= LONGEST_PAUSE
            paused += 1
    assert paused == (tries - 1 if tries else 100)


async def test_watch_does_not_insist(call: Caller, servicer: Servicer) -> None:
    """What another try cannot mend is raised at once."""
    info = error_details_pb2.ErrorInfo(reason="job_not_found", domain="img2img")
    servicer.answers["watch"] = [status(code_pb2.NOT_FOUND, "No job", info)]
    with pytest.raises(ClientError) as caught:
        await call("watch", "0-1")
    assert (caught.value.code, len(servicer.asked)) == ("job_not_found", 1)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_no_service(kind: type[Client] | type[AsyncClient], unused_tcp_port: int) -> None:
    """When nobody answers, the error says where."""
    client = kind(f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(ClientError, match=f"No service answers at 127.0.0.1:{unused_tcp_port}") as caught:
        await Caller(client)("get", "0-1")
    assert caught.value.code == "unavailable"
    await Caller(client)("close")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_tls(kind: type[Client] | type[AsyncClient], servicer: Servicer, tmp_path: Path) -> None:
    """With ``ca`` the connection is encrypted and the server's certificate checked."""
    certificate, key = self_signed("localhost")
    (tmp_path / "ca.pem").write_bytes(certificate)
    server = grpc.aio.server()
    img2img_pb2_grpc.add_Img2ImgServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    servicer.answers["get"] = [pb.GetJobResponse(job=job())]
    trusting, distrusting = kind(f"localhost:{port}", ca=tmp_path / "ca.pem"), kind(f"localhost:{port}", tls=True)
    assert (await Caller(trusting)("get", "0-1")).id == "0-1"
    with pytest.raises(ClientError) as caught:
        await Caller(distrusting)("get", "0-1")
    assert caught.value.code == "unavailable"
    for client in (trusting, distrusting):
        await Caller(client)("close")
    await server.stop(None)


def self_signed(host: str) -> tuple[bytes, bytes]:
    """A certificate for ``host`` and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), secret


async def test_cancelling_the_task_cancels_the_call(server: str, servicer: Servicer) -> None:
    """Cancelling ``generate`` reaches the server, which ends the job."""
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def wait(method: str, request: Any, context: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    servicer._answer = wait  # type: ignore[method-assign]
    async with AsyncClient(server) as client:
        task = asyncio.create_task(client.generate(prompt="x"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            await cancelled.wait()
