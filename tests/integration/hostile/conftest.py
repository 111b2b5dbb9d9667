"""What is attacked: a gateway with a worker, which must stay whole."""

from collections.abc import Iterator

import httpx
import pytest
from hostile_helpers import peak_megabytes

from tests.calls import is_picture, run_path
from tests.stack import Gateway, Stack

MAX_MEGABYTES = 600


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        gateway = stack.gateway()
        stack.worker(concurrency="2")
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture(autouse=True)
def unharmed(gateway: Gateway, client: httpx.Client) -> Iterator[None]:
    """After each test the gateway still makes pictures, has logged no defect and has stayed small."""
    yield
    assert is_picture(client.post(run_path(), content='{"prompt": "x"}'))
    assert [entry for entry in gateway.entries() if entry.get("level") in ("error", "critical")] == []
    assert peak_megabytes(gateway.pid) < MAX_MEGABYTES
