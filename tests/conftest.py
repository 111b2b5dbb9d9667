"""Fixtures that most tests share: a real Valkey server, and real processes on it."""

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import redis

from img2img.embedded import EmbeddedValkey
from tests.stack import Stack

NEW_CERTIFICATE: Final = [
    "openssl",
    "req",
    "-x509",
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:prime256v1",
    "-nodes",
]
FOR_LOOPBACK: Final = ["-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]

# As worker.engines.diffusion.threads does, for test modules that import torch before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def running_valkey(folder: Path) -> Iterator[str]:
    """A server in a thread with a loop of its own, so that synchronous and asynchronous tests can use it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="valkey")
    thread.start()
    server = EmbeddedValkey(folder, durable=False)
    try:
        asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(30)
        try:
            yield server.url
        finally:
            asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fresh, empty server for the tests of one module."""
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def empty_server(valkey_url: str) -> None:
    """The module's server, without what its earlier tests left there."""
    with redis.Redis.from_url(valkey_url) as server:
        server.flushall()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [*NEW_CERTIFICATE, *FOR_LOOPBACK, "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture
def stack(valkey_url: str, tmp_path: Path) -> Iterator[Stack]:
    """Gateways and workers, started by the test as it needs them."""
    with Stack(valkey_url, tmp_path) as processes:
        yield processes
