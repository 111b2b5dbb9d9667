"""The client for plain code. Its twin for asyncio stands in ``aio.py``, method for method."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from img2img.client import channel, messages
from img2img.client.channel import DEFAULT_SERVER, SHORT_TIMEOUT, client_error
from img2img.client.values import ClientError, Event, JobInfo, JobPage, Picture, RequestFields
from img2img.jobs import JobState
from img2img.v1 import img2img_pb2 as pb
from img2img.v1 import img2img_pb2_grpc


class Client:
    """Open it with ``with``; threads may share one. Every method raises :class:`ClientError`."""

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
            self._channel = grpc.secure_channel(server, credentials, options)
        else:
            self._channel = grpc.insecure_channel(server, options)
        stub: Any = img2img_pb2_grpc.Img2ImgServiceStub
        self._stub: Any = stub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, *, timeout: float | None = None, **fields: Unpack[RequestFields]) -> Picture:
        """Make a picture and wait for it; ``timeout`` (seconds) is the job's deadline too."""
        response = self._call(self._stub.Generate, messages.generate_request(fields), timeout)
        job = messages.job_info(response.job)
        return Picture(job, response.image or self.result(job.id))

    def create(self, **fields: Unpack[RequestFields]) -> JobInfo:
        """Queue a job and return at once."""
        return messages.job_info(self._call(self._stub.CreateJob, messages.create_request(fields)).job)

    def get(self, job_id: str, *, wait: float = 0.0) -> JobInfo:
        """The job; with ``wait``, as soon as it has ended, or as it stands after that many seconds."""
        request = pb.GetJobRequest(id=job_id, wait_seconds=wait)
        return messages.job_info(self._call(self._stub.GetJob, request, wait + SHORT_TIMEOUT).job)

    def list(self, *, state: JobState | None = None, limit: int = 20, page: str | None = None) -> JobPage:
        """The newest jobs; ``page`` is the ``next_page`` of the answer before."""
        return messages.job_page(self._call(self._stub.ListJobs, messages.list_request(state, limit, page)))

    def watch(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """The job's events after sequence number ``after``, up to its last end, across broken connections."""
        progress = messages.Progress(after)
        while not progress.ended:
            broken = None
            try:
                with closing(self._stream(self._stub.WatchJob, progress.request(job_id))) as stream:
                    for message in stream:
                        yield progress.take(message)
            except ClientError as exc:
                broken = exc
            time.sleep(progress.pause(broken))

    def cancel(self, job_id: str) -> JobInfo:
        """Ask the job to stop; one that has ended stays as it is."""
        return messages.job_info(self._call(self._stub.CancelJob, pb.CancelJobRequest(id=job_id)).job)

    def replay(self, job_id: str) -> JobInfo:
        """Run a failed, canceled or expired job again under its id; one that is queued or runs goes on as it is."""
        return messages.job_info(self._call(self._stub.ReplayJob, pb.ReplayJobRequest(id=job_id)).job)

    def result(self, job_id: str, *, timeout: float = 2 * SHORT_TIMEOUT) -> bytes:
        """The finished picture's file."""
        parts = messages.Parts()
        for message in self._stream(self._stub.GetResult, pb.GetResultRequest(id=job_id), timeout):
            parts.add(message)
        return parts.joined()

    def _call(self, method: Any, request: Any, timeout: float | None = SHORT_TIMEOUT) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as exc:
            raise client_error(exc, self._server) from exc

    def _stream(self, method: Any, request: Any, timeout: float | None = None) -> Generator[Any]:
        call = method(request, timeout=timeout, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as exc:
            raise client_error(exc, self._server) from exc
        finally:
            call.cancel()
