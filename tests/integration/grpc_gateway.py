"""A gRPC gateway and a worker with the fake engine in the test's own event loop, on a real Valkey server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import grpc
import grpc.aio
import msgspec
import redis
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from gateway.budget import Budgets
from gateway.certificates import open_certificates
from gateway.drain import Drain
from gateway.routing import Router, open_router
from gateway.rpc.server import RpcServer, open_server
from gateway.service import JobService
from gateway.tenants import Tenants
from gateway.upkeep import run_upkeep
from img2img.events import EventHub
from img2img.queue_types import WorkerInfo
from img2img.settings import Settings
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from img2img.wiring import Parts, open_parts
from worker.consumer import Consumer
from worker.engines.fake import FakeEngine
from worker.runner import JobRunner

FOREVER = "fake:step=3600"
"""A prompt whose job runs until it is stopped."""


class Gateway(msgspec.Struct, frozen=True):
    """What a test needs of a running gateway; ``stub`` and ``channel`` carry no key."""

    parts: Parts
    service: JobService
    rpc: RpcServer
    budgets: Budgets
    drain: Drain
    channel: grpc.aio.Channel
    stub: Any

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.rpc.port}"


def fresh_settings(redis_url: str, **changes: Any) -> Settings:
    """Settings for any free port and no waiting, on a server that is emptied first."""
    with redis.Redis.from_url(redis_url) as server:
        server.flushall()
    fast: dict[str, Any] = {"retry_delay": 0.01, "progress_interval": 0.0, "drain_timeout": 5.0, "concurrency": 4}
    return Settings(redis_url=redis_url, grpc_port=0, **fast | changes)


@asynccontextmanager
async def open_gateway(
    settings: Settings,
    *,
    tenants: Tenants | None = None,
    worker: bool = True,
    make_service: Callable[[Parts, EventHub, Tenants, Router], JobService] = JobService,
) -> AsyncIterator[Gateway]:
    """A gateway, with a worker unless told otherwise; everything is closed in reverse order."""
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(open_parts(settings))
        hub = await stack.enter_async_context(EventHub(parts.queue))
        tenants = tenants or Tenants.open_local()
        service = make_service(parts, hub, tenants, open_router(settings))
        budgets, drain = Budgets(settings.max_body_bytes_in_flight), Drain(parts.queue, settings)
        certificates = await stack.enter_async_context(open_certificates(settings, "tls_cert", "tls_key"))
        rpc = await stack.enter_async_context(open_server(service, tenants, settings, budgets, drain, certificates))
        rpc.set_serving(True)
        await stack.enter_async_context(_upkeep(parts))
        if worker:
            await stack.enter_async_context(_worker(parts))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{rpc.port}"))
        yield Gateway(parts, service, rpc, budgets, drain, channel, Img2ImgServiceStub(channel))


async def events_of(stub: Any, job_id: str, after: int = 0) -> list[pb.WatchJobResponse]:
    """A job's events after ``after``, up to its end."""
    return [event async for event in stub.WatchJob(pb.WatchJobRequest(id=job_id, after=after))]


async def started(stub: Any, job_id: str) -> None:
    """Return as soon as the job's engine works."""
    call = stub.WatchJob(pb.WatchJobRequest(id=job_id))
    async for event in call:
        if event.type == "progress":
            break
    call.cancel()


async def only_job(stub: Any) -> pb.Job:
    """The first job there is, as soon as there is one: ``Generate`` tells its job's id only at the end."""
    while True:
        page: pb.ListJobsResponse = await stub.ListJobs(pb.ListJobsRequest())
        if page.jobs:
            return page.jobs[0]


class Refusal(msgspec.Struct, frozen=True):
    """An error answer, with its google.rpc details by type."""

    code: grpc.StatusCode
    message: str
    details: dict[type[Message], Any]

    @property
    def reason(self) -> str:
        """Our stable code."""
        info = self.details[error_details_pb2.ErrorInfo]
        assert info.domain == "img2img"
        return str(info.reason)

    @property
    def fields(self) -> list[str]:
        return [item.field for item in self.details[error_details_pb2.BadRequest].field_violations]


async def refusal_of(call: Awaitable[Any]) -> Refusal:
    """The error that a call, unary or the read of a stream, ends with."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as exc:
        status = rpc_status.from_call(exc)
        details = {} if status is None else {type(detail): detail for detail in map(_unpacked, status.details)}
        return Refusal(exc.code(), exc.details() or "", details)
    raise AssertionError(f"answered {answer!r}")


def _unpacked(packed: Any) -> Message:
    kind = getattr(error_details_pb2, packed.type_url.rpartition(".")[2])
    detail: Message = kind()
    assert packed.Unpack(detail)
    return detail


@asynccontextmanager
async def _worker(parts: Parts) -> AsyncIterator[None]:
    async with FakeEngine() as engine:
        info = WorkerInfo(f"worker-{uuid4().hex}", parts.settings.concurrency, "fake", "fake", "cpu")
        runner = JobRunner(parts.queue, parts.blobs, engine, parts.settings, info.id)
        consumer = Consumer(parts.queue, runner, engine, info, parts.settings)
        async with asyncio.TaskGroup() as group:
            group.create_task(consumer.main(), name="worker")
            try:
                yield
            finally:
                consumer.drain()


@asynccontextmanager
async def _upkeep(parts: Parts) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run_upkeep(parts.queue, parts.blobs, 0.0), name="upkeep")
        try:
            yield
        finally:
            task.cancel()
