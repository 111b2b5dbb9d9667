"""A gateway and a worker that have done a job, and what each shows at its /metrics."""

from collections.abc import Iterator

import httpx
import pytest

from tests.deploy.measured import Series, scraped
from tests.metrics import OPENMETRICS, metrics_url
from tests.stack import Stack, eventually, state_of, submit
from tests.valkey import ValkeyServer


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The base URLs of a gateway, and of what a worker serves, once a job has ended."""
    folder = tmp_path_factory.mktemp("deploy")
    with ValkeyServer(folder / "valkey") as server, Stack(server.url, folder) as stack:
        gateway, worker = stack.gateway(), stack.worker()
        with gateway.client() as client:
            job = submit(client, prompt="a lion")["id"]
            eventually(lambda: state_of(client, job) == "succeeded", "the job's end")
        yield gateway.http, metrics_url(worker)


@pytest.fixture(scope="session")
def exposed(running: tuple[str, str]) -> dict[str, Series]:
    """Every series of both, by name."""
    found: dict[str, Series] = {}
    with httpx.Client(trust_env=False, timeout=60, headers=OPENMETRICS) as client:
        for address in running:
            found |= scraped(client.get(f"{address}/metrics").text)
    return found
