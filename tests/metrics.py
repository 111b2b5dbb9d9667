"""What `/metrics` of a real process says, as Prometheus reads it."""

from collections.abc import Iterator
from typing import Final

import httpx
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.stack import Process, eventually

OPENMETRICS: Final = {"accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3"}
"""What Prometheus asks for."""


def metrics_url(worker: Process) -> str:
    """Where a worker serves its metrics and probes, according to its log."""

    def look() -> str | None:
        ports = [entry["port"] for entry in worker.entries() if entry.get("event") == "metrics_ready"]
        return f"http://127.0.0.1:{ports[0]}" if ports else None

    return eventually(look, f"a port for metrics:\n{worker.log.read_text()}") or ""


class Scrape:
    """The samples of one answer."""

    def __init__(self, url: str) -> None:
        answer = httpx.get(f"{url}/metrics", headers=OPENMETRICS, timeout=10, trust_env=False).raise_for_status()
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        self.families = list(text_string_to_metric_families(answer.text))

    @property
    def samples(self) -> Iterator[Sample]:
        for family in self.families:
            yield from family.samples

    @property
    def sampled(self) -> set[str]:
        """The names of the families that have a sample."""
        return {family.name for family in self.families if family.samples}

    def value(self, name: str, **labels: str) -> float:
        """The sample with these labels, of whatever others; 0 without one."""
        found = [sample.value for sample in self._like(name, labels)]
        assert len(found) <= 1, found
        return float(found[0]) if found else 0.0

    def traces(self, name: str, **labels: str) -> set[str]:
        """The traces that a histogram's buckets name."""
        exemplars = [sample.exemplar for sample in self._like(f"{name}_bucket", labels)]
        return {exemplar.labels["trace_id"] for exemplar in exemplars if exemplar is not None}

    def _like(self, name: str, labels: dict[str, str]) -> Iterator[Sample]:
        return (sample for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items())
