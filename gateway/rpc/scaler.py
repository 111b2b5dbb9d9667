"""KEDA's external-push scaler, on a port of its own: KEDA's only way to say who it is is a client certificate.

A ScaledObject's trigger has the metadata ``pool``; ``targetSeconds``, the work that one worker may owe; and
``activationSeconds``, above which work brings a first worker.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import grpc
import grpc.aio
import structlog

from gateway.certificates import open_certificates
from gateway.rpc.errors import abort, to_status
from gateway.rpc.externalscaler import externalscaler_pb2 as pb
from gateway.rpc.externalscaler.externalscaler_pb2_grpc import (
    ExternalScalerServicer,
    add_ExternalScalerServicer_to_server,
)
from gateway.rpc.listening import OPTIONS, bind
from gateway.scaling import FRESH_SECONDS, LEAST_TARGET, Scaling, Signal, is_active, seconds_in
from img2img.errors import Img2ImgError, Unavailable
from img2img.settings import Settings

METRIC: Final = "img2img-demand-seconds"
MAX_MESSAGE: Final = 64 * 1024
"""Bytes; a ScaledObject's metadata are short."""
STOP_SECONDS: Final = 1.0

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


class ScalerServicer(ExternalScalerServicer):
    """Answers from :class:`Scaling`, like every other outlet."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Let go of the streams, so that KEDA opens them elsewhere."""
        self._closed.set()

    async def IsActive(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:  # noqa: N802
        async with _answering(context):
            return pb.IsActiveResponse(result=await self._is_active(request))

    async def StreamIsActive(self, request: pb.ScaledObjectRef, context: Context) -> None:  # noqa: N802
        """Says what is so at once, and then each change. A queue server that is away changes nothing: an error would
        make KEDA wait for up to a minute before it asks again.
        """
        told: bool | None = None
        async with _answering(context):
            while not self._closed.is_set():
                try:
                    active = await self._is_active(request)
                    if active != told:
                        await context.write(pb.IsActiveResponse(result=active))
                    told = active
                except Unavailable as exc:
                    log.warning("scaler_stream_waits", error=str(exc))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), FRESH_SECONDS)

    async def GetMetricSpec(  # noqa: N802
        self, request: pb.ScaledObjectRef, context: Context
    ) -> pb.GetMetricSpecResponse:
        async with _answering(context):
            self._scaling.check(_pool(request))
            target = self._target(request)
            spec = pb.MetricSpec(metricName=METRIC, targetSize=math.ceil(target), targetSizeFloat=target)
            return pb.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(  # noqa: N802
        self, request: pb.GetMetricsRequest, context: Context
    ) -> pb.GetMetricsResponse:
        async with _answering(context):
            demand = (await self._signal(request.scaledObjectRef)).demand_seconds
            value = pb.MetricValue(metricName=METRIC, metricValue=math.ceil(demand), metricValueFloat=demand)
            return pb.GetMetricsResponse(metricValues=[value])

    async def _is_active(self, request: pb.ScaledObjectRef) -> bool:
        activation = _seconds(request, "activationSeconds", 0.0, least=0.0)
        return is_active(await self._signal(request), activation)

    async def _signal(self, request: pb.ScaledObjectRef) -> Signal:
        return await self._scaling.signal(_pool(request), self._target(request))

    def _target(self, request: pb.ScaledObjectRef) -> float:
        return _seconds(request, "targetSeconds", self._scaling.default_target, least=LEAST_TARGET)


@asynccontextmanager
async def open_scaler(scaling: Scaling, settings: Settings) -> AsyncIterator[int | None]:
    """Serve on ``settings.scaler_port`` (0 for any) and yield the port; None where it is -1, and nothing is served.

    Raises:
        ConfigurationError: the port cannot be had, or a certificate is of no use.
    """
    if settings.scaler_port < 0:
        yield None
        return
    servicer = ScalerServicer(scaling)
    server = grpc.aio.server(options=[*OPTIONS, ("grpc.max_receive_message_length", MAX_MESSAGE)])
    add_ExternalScalerServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    async with open_certificates(settings, "scaler_tls_cert", "scaler_tls_key", "scaler_client_ca") as certificates:
        port = bind(server, settings, "scaler_port", certificates)
        await server.start()
        try:
            yield port
        finally:
            servicer.close()
            await server.stop(STOP_SECONDS)


@asynccontextmanager
async def _answering(context: Context) -> AsyncIterator[None]:
    """Our errors become the call's status."""
    try:
        yield
    except Img2ImgError as exc:
        await abort(context, to_status(exc))


def _pool(request: pb.ScaledObjectRef) -> str | None:
    return request.scalerMetadata.get("pool")


def _seconds(request: pb.ScaledObjectRef, name: str, default: float, *, least: float) -> float:
    return seconds_in(name, request.scalerMetadata.get(name), default, least=least)
