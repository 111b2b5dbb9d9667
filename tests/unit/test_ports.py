"""Ports for processes that are yet to start, and may have to start again."""

import itertools
import socket

import pytest

from img2img.errors import ConfigurationError
from img2img.ports import any_port, free_ports

HOST = "127.0.0.1"


async def test_any_port_is_one_that_nobody_is_given_in_the_meantime() -> None:
    """As a connection, or whoever else asks for any."""
    one, other = await free_ports(HOST, {"--http-port": 0, "--grpc-port": 0})
    with socket.create_server((HOST, 0)) as anybody:
        assert one != other
        assert max(one, other) < 32_768 <= anybody.getsockname()[1]
    for port in (one, other):
        socket.create_server((HOST, port)).close()


async def test_another_one_is_taken_in_place_of_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as taken:
        in_use = taken.getsockname()[1]
        numbers = itertools.chain([in_use], iter(any_port, None))
        monkeypatch.setattr("img2img.ports.any_port", lambda: next(numbers))
        (port,) = await free_ports(HOST, {"--http-port": 0})
    assert port != in_use


async def test_a_port_in_use_is_named_with_its_option() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} cannot be used .* choose another with --http-port"):
            await free_ports(HOST, {"--http-port": port})
