"""What a probe learns of a worker, over its own port."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from structlog.testing import capture_logs

from img2img.errors import ConfigurationError
from worker.probes import Probes, serving_probes
from worker.watchdog import Watchdog

STALL = 0.2


@contextmanager
def served(probes: Probes) -> Iterator[httpx.Client]:
    with (
        capture_logs() as logs,
        serving_probes(probes, "127.0.0.1", 0),
        httpx.Client(trust_env=False, timeout=60) as client,
    ):
        client.base_url = httpx.URL(f"http://127.0.0.1:{logs[0]['port']}")
        yield client


def status(client: httpx.Client, probe: str) -> tuple[int, str]:
    answer = client.get(f"/health/{probe}")
    return answer.status_code, json.loads(answer.text)["status"]


async def test_an_event_loop_that_is_held_up_is_not_live() -> None:
    """The answer comes all the same, and is a good one again when the loop comes round."""
    watchdog = Watchdog(STALL, 600.0)
    with served(Probes(watchdog)) as client:
        assert status(client, "live") == (200, "live")
        watchdog.watch_loop()
        while (told := status(client, "live")) == (200, "live"):
            pass  # to ask holds up this very loop
        assert told == (503, "event loop stalled")
        async with asyncio.timeout(60):
            while (told := await asyncio.to_thread(status, client, "live")) == (503, "event loop stalled"):
                pass
        assert told == (200, "live")


def test_a_worker_starts_before_it_is_ready() -> None:
    """While its model is loaded it lives, and claims nothing."""
    probes = Probes(Watchdog(STALL, 600.0))
    with served(probes) as client:
        assert (status(client, "live"), status(client, "ready")) == ((200, "live"), (503, "starting"))
        for readiness, code in (("queue server unavailable", 503), ("ready", 200), ("draining", 503)):
            probes.follow(Consumer(readiness))
            assert status(client, "ready") == (code, readiness)


def test_a_port_that_is_taken_is_told() -> None:
    """In one line, with the setting to change."""
    probes = Probes(Watchdog(STALL, 600.0))
    with served(probes) as client:
        port = client.base_url.port
        expected = rf"Cannot listen on 127\.0\.0\.1:{port} \(Address already in use\): change IMG2IMG_METRICS_PORT"
        with pytest.raises(ConfigurationError, match=expected), serving_probes(probes, "127.0.0.1", port or 0):
            pass


def test_no_port_is_taken_if_none_is_wanted() -> None:
    """-1 switches metrics and probes off."""
    with capture_logs() as logs, serving_probes(Probes(Watchdog(STALL, 600.0)), "127.0.0.1", -1):
        assert logs == []
        assert not [thread for thread in threading.enumerate() if thread.name == "probes"]


class Consumer:
    """Says of itself what it is told to."""

    def __init__(self, readiness: str) -> None:
        self.readiness = readiness
