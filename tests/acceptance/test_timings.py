"""A job tells where its time went, from its creation to its end: real workers of every engine."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.collector import Collector, collecting
from tests.stack import DOG, Gateway, Stack, ended, submit
from tests.upstream.running import UpstreamProcess

CLAIMED = 0.95
"""The least share of a job's life that its worker must have measured itself."""
MILLISECONDS = 0.0021
"""Created and finished are told in whole ones."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        yield running


@pytest.fixture(scope="module")
def running(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[tuple[Stack, Gateway]]:
    with Stack(valkey_url, tmp_path_factory.mktemp("timings")) as stack:
        yield stack, stack.gateway()


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[UpstreamProcess]:
    process = UpstreamProcess(tmp_path / "upstream.log", "--delay", "1.5")
    yield process
    process.close()


def timings_of(running: tuple[Stack, Gateway], **settings: str) -> dict[str, float]:
    """Of a job of about two seconds on a worker with these settings, after checking that they add up."""
    stack, gateway = running
    worker = stack.worker(**settings)
    request: dict[str, Any] = {"prompt": "a lion", "image": list(DOG.read_bytes()), "seed": 1}
    with gateway.client() as client:
        job_id = submit(client, **request, num_steps=20, width=384, height=384)["id"]
        job = ended(client, job_id)
    worker.close()
    assert job["state"] == "succeeded", job
    life = (datetime.fromisoformat(job["finished_at"]) - datetime.fromisoformat(job["created_at"])).total_seconds()
    timings: dict[str, float] = job["timings"]
    assert sum(timings.values()) == pytest.approx(life, abs=MILLISECONDS)
    # What no stage has measured would be in the last one, which writes a record and no more.
    assert life - timings["finish"] >= CLAIMED * life, timings
    return timings


def test_the_time_of_a_fake_job_adds_up(running: tuple[Stack, Gateway]) -> None:
    timings = timings_of(running, fake_step_seconds="0.1")
    assert max(timings, key=lambda stage: timings[stage]) == "steps"


def test_the_time_of_a_diffusion_job_adds_up(running: tuple[Stack, Gateway], collector: Collector) -> None:
    """Every network has a stage of its own; that of the steps tells what the device did at once."""
    timings = timings_of(running, engine="diffusion", device="cpu")
    assert {"encode_text", "encode_image", "steps", "decode_image"} <= timings.keys()
    (steps,) = (span for span in collector.spans if span.name == "stage steps" and span.attributes)
    assert steps.attributes == {"img2img.passes": 20, "img2img.pass.rows.mean": 2.0}


def test_the_time_of_an_upstream_job_adds_up(running: tuple[Stack, Gateway], upstream: UpstreamProcess) -> None:
    timings = timings_of(running, **upstream.settings())
    assert max(timings, key=lambda stage: timings[stage]) == "upstream"
