"""What KEDA does with an external-push scaler: its calls, and the sum that its HPA makes of the answers."""

import math
from collections.abc import Iterator
from typing import Any, Self

import grpc

from gateway.rpc.externalscaler import externalscaler_pb2 as pb
from gateway.rpc.externalscaler.externalscaler_pb2_grpc import ExternalScalerStub

SECONDS = 30.0


class Keda:
    """Of one ScaledObject, with the metadata of its trigger."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None, **metadata: str) -> None:
        if credentials is None:
            self._channel = grpc.insecure_channel(address)
        else:
            self._channel = grpc.secure_channel(address, credentials)
        self._stub: Any = ExternalScalerStub(self._channel)  # type: ignore[no-untyped-call]
        self._object = pb.ScaledObjectRef(name="workers", namespace="img2img", scalerMetadata=metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def is_active(self) -> bool:
        return bool(self._stub.IsActive(self._object, timeout=SECONDS).result)

    def pushed(self) -> Iterator[bool]:
        """What the stream says, until the channel is closed."""
        for answer in self._stub.StreamIsActive(self._object, timeout=2 * SECONDS):
            yield answer.result

    def target(self) -> float:
        """The average for each worker that the HPA is to aim at."""
        return float(self._spec().targetSizeFloat)

    def metric(self) -> float:
        request = pb.GetMetricsRequest(scaledObjectRef=self._object, metricName=self._spec().metricName)
        (value,) = self._stub.GetMetrics(request, timeout=SECONDS).metricValues
        assert value.metricValue == math.ceil(value.metricValueFloat)
        return float(value.metricValueFloat)

    def replicas(self) -> int:
        """How many workers the HPA wants, beyond its tolerance."""
        return math.ceil(self.metric() / self.target())

    def _spec(self) -> Any:
        (spec,) = self._stub.GetMetricSpec(self._object, timeout=SECONDS).metricSpecs
        return spec
