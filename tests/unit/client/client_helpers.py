"""A gRPC server whose answers the tests decide, and one way to call either client."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from grpc_status import rpc_status

from img2img.client import (
    AsyncClient,
    Client,
)
from img2img.v1 import img2img_pb2 as pb
from img2img.v1 import img2img_pb2_grpc

PICTURE = bytes(range(256)) * 64
AT = datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC)
LOST = pb.JobError(code="worker_lost", message="gone")
STAMP = Timestamp(seconds=int(AT.timestamp()), nanos=250_000_000)


class Servicer(img2img_pb2_grpc.Img2ImgServiceServicer):
    """Keeps what it was asked, and answers what the test put into ``answers``: messages or statuses."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.answers: dict[str, list[Any]] = {}

    async def _answer(self, method: str, request: Any, context: Any) -> Any:
        self.asked.append(request)
        self.metadata = dict(context.invocation_metadata())
        answers = self.answers[method]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, status_pb2.Status):
            status = rpc_status.to_status(answer)
            await context.abort(status.code, status.details, status.trailing_metadata)
        return answer

    async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("generate", request, context)

    async def CreateJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("create", request, context)

    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("get", request, context)

    async def ListJobs(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("list", request, context)

    async def CancelJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("cancel", request, context)

    async def ReplayJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("replay", request, context)

    async def GetResult(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for message in await self._answer("result", request, context):
            yield message

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for message in await self._answer("watch", request, context):
            if isinstance(message, status_pb2.Status):
                status = rpc_status.to_status(message)
                await context.abort(status.code, status.details, status.trailing_metadata)
            yield message


class Caller:
    """Calls a method of either client, the plain one in a thread."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        function = getattr(self.client, method)
        if isinstance(self.client, AsyncClient):
            if method == "watch":
                return [event async for event in function(*args, **kwargs)]
            return await function(*args, **kwargs)
        if method == "watch":
            return await asyncio.to_thread(lambda: list(function(*args, **kwargs)))
        return await asyncio.to_thread(function, *args, **kwargs)


def job(**fields: Any) -> pb.Job:
    return pb.Job(id="0-1", state=pb.JOB_STATE_SUCCEEDED, create_time=STAMP, expire_time=STAMP, **fields)


def status(code: int, message: str, *details: Any) -> status_pb2.Status:
    found = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        found.details.append(packed)
    return found


def happened(sequence: int, state: pb.JobState = pb.JOB_STATE_RUNNING, **fields: Any) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(sequence=sequence, type="progress", time=STAMP, state=state, attempt=1, **fields)


def chunks(data: bytes, announced: bytes | None = None) -> list[pb.GetResultResponse]:
    result = pb.JobResult(sha256=hashlib.sha256(announced or data).hexdigest())
    parts = [data[start : start + 1000] for start in range(0, len(data), 1000)]
    return [pb.GetResultResponse(result=result), *(pb.GetResultResponse(chunk=part) for part in parts)]
