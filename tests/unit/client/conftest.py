"""What the tests of the clients share: a server that answers as it is told, and both clients."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from client_helpers import Caller, Servicer

from img2img.client import (
    AsyncClient,
    Client,
)
from img2img.v1 import img2img_pb2_grpc


@pytest.fixture
async def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def server(servicer: Servicer) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 1024 * 1024)])
    img2img_pb2_grpc.add_Img2ImgServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture(params=["sync", "async"])
async def call(request: pytest.FixtureRequest, server: str) -> AsyncIterator[Caller]:
    if request.param == "sync":
        with Client(server, key="secret") as client:
            yield Caller(client)
    else:
        async with AsyncClient(server, key="secret") as aclient:
            yield Caller(aclient)
