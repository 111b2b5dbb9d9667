"""What the health service tells a watcher."""

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from gateway.rpc.health import NOT_SERVING, SERVING, HealthServicer


async def test_an_end_while_a_status_is_on_its_way_is_told() -> None:
    """Before the watcher is let go: it had read the status before the server knew that it was sent."""
    servicer = HealthServicer()
    servicer.set_serving(True)

    class Watcher:
        def __init__(self) -> None:
            self.told: list[int] = []

        async def write(self, answer: Any) -> None:
            self.told.append(answer.status)
            servicer.close()

        async def abort(self, code: grpc.StatusCode, _: str) -> None:
            raise ConnectionError(code)

    watcher: Any = Watcher()
    with pytest.raises(ConnectionError, match="UNAVAILABLE"):
        await servicer.Watch(health_pb2.HealthCheckRequest(), watcher)
    assert watcher.told == [SERVING, NOT_SERVING]
