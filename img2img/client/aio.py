"""The client for asyncio. Its twin for plain code stands in ``sync.py``, method for method."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc.aio

from img2img.client import channel, messages
from img2img.client.channel import DEFAULT_SERVER, SHORT_TIMEOUT, client_error
from img2img.client.values import ClientError, Event, JobInfo, JobPage, Picture, RequestFields
from img2img.jobs import JobState
from img2img.v1 import img2img_pb2 as pb
from img2img.v1 import img2img_pb2_grpc


class AsyncClient:
    """Open it with ``async with``, in the loop that uses it. Every method raises :class:`ClientError`."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        key: str | None = None,
        tls: bool = False,
        ca: Path | None = None,
    ) -> None:
        """``key`` is the account's; ``ca``, a PEM file, implies TLS and replaces the system's roots.

        Raises:
            ClientError: the key cannot be one.
        """
        self._server = server
        self._metadata = channel.call_metadata(key)
        credentials, options = channel.channel_credentials(tls, ca), channel.channel_options(server)
        if credentials:
            self._channel = grpc.aio.secure_channel(server, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(server, options)
        stub: Any = img2img_pb2_grpc.Img2ImgServiceStub
        self._stub: Any = stub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Picture:
        """Make a picture and wait for it; ``timeout`` (seconds) is the job's deadline too.

        Cancelling the task cancels the job.
        """
        response = await self._call(self._stub.Generate, messages.generate_request(fields), timeout)
        job = messages.job_info(response.job)
        return Picture(job, response.image or await self.result(job.id))

    async def create(self, **fields: Unpack[RequestFields]) -> JobInfo:
        """Queue a job and return at once."""
        return messages.job_info((await self._call(self._stub.CreateJob, messages.create_request(fields))).job)

    async def get(self, job_id: str, *, wait: float = 0.0) -> JobInfo:
        """The job; with ``wait``, as soon as it has ended, or as it stands after that many seconds."""
        request = pb.GetJobRequest(id=job_id, wait_seconds=wait)
        return messages.job_info((await self._call(self._stub.GetJob, request, wait + SHORT_TIMEOUT)).job)

    async def list(self, *, state: JobState | None = None, limit: int = 20, page: str | None = None) -> JobPage:
        """The newest jobs; ``page`` is the ``next_page`` of the answer before."""
        request = messages.list_request(state, limit, page)
        return messages.job_page(await self._call(self._stub.ListJobs, request))

    async def watch(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """The job's events after sequence number ``after``, up to its last end, across broken connections."""
        progress = messages.Progress(after)
        while not progress.ended:
            broken = None
            try:
                async with aclosing(self._stream(self._stub.WatchJob, progress.request(job_id))) as stream:
                    async for message in stream:
                        yield progress.take(message)
            except ClientError as exc:
                broken = exc
            await asyncio.sleep(progress.pause(broken))

    async def cancel(self, job_id: str) -> JobInfo:
        """Ask the job to stop; one that has ended stays as it is."""
        request = pb.CancelJobRequest(id=job_id)
        return messages.job_info((await self._call(self._stub.CancelJob, request)).job)

    async def replay(self, job_id: str) -> JobInfo:
        """Run a failed, canceled or expired job again under its id; one that is queued or runs goes on as it is."""
        request = pb.ReplayJobRequest(id=job_id)
        return messages.job_info((await self._call(self._stub.ReplayJob, request)).job)

    async def result(
        self,
        job_id: str,
        *,
        timeout: float = 2 * SHORT_TIMEOUT,
    ) -> bytes:
        """The finished picture's file."""
        parts = messages.Parts()
        async for message in self._stream(self._stub.GetResult, pb.GetResultRequest(id=job_id), timeout):
            parts.add(message)
        return parts.joined()

    async def _call(self, method: Any, request: Any, timeout: float | None = SHORT_TIMEOUT) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as exc:
            raise client_error(exc, self._server) from exc

    async def _stream(self, method: Any, request: Any, timeout: float | None = None) -> AsyncGenerator[Any]:
        call = method(request, timeout=timeout, metadata=self._metadata)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as exc:
            raise client_error(exc, self._server) from exc
        finally:
            call.cancel()
