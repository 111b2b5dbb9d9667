"""What traces cost: the same jobs with all of their spans kept and exported, and without any.

Starts a Valkey (append-only file, synced on every write) and services on it, each a gateway and a worker, which export
their spans over OTLP to a receiver in this process:

* synchronous calls to the bundled model, every other one in a trace that its caller does not keep: how long a job
  takes, and how long the CPU's cores work for it. One service makes both, because two differ by more than this;
* calls to the `fake` engine, by turns of one service that exports spans and one that makes none: how long the cores
  work for a job in gateway and worker, and how many spans it has.

    python bench/tracing.py [--quick]
"""

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from img2img.embedded import EmbeddedValkey
from tests.collector import Collector, collecting
from tests.stack import MODEL_PATH, Gateway, Process, Stack

PATH: Final = MODEL_PATH.format(account="local")
BODY: Final = {"prompt": "a lion", "seed": 1, "width": 256, "height": 256}
WARM: Final = 3
"""Pairs, or blocks, that do not count: the first spans to be exported cost more than all those that follow."""
CPU_CLOCK: Final = 2
"""As Linux' clock_getcpuclockid has it: ``CPUCLOCK_SCHED`` of a process, whose id is in the upper bits."""
BLOCK: Final = 50
"""Jobs of the fake engine between two looks at the CPU's clocks."""


class Service:
    """A gateway and a worker, and a client of theirs."""

    def __init__(self, stack: Stack, engine: str, queue: str = "default") -> None:
        more = {"engine": engine, "queue": queue}
        self.worker: Process = stack.worker(**more, log_level="info")
        self.gateway: Gateway = stack.gateway(**more, log_level="info")
        self._client = self.gateway.client()

    def call(self, steps: int, traceparent: str | None = None) -> float:
        """Milliseconds of one synchronous call."""
        headers = {} if traceparent is None else {"traceparent": traceparent}
        started = time.perf_counter()
        self._client.post(PATH, json={**BODY, "num_steps": steps}, headers=headers).raise_for_status()
        return (time.perf_counter() - started) * 1000

    def cpu_seconds(self) -> dict[str, float]:
        """What all threads of each process have used so far, those that have ended among them."""
        return {"gateway": _cpu_seconds(self.gateway.pid), "worker": _cpu_seconds(self.worker.pid)}

    def close(self) -> None:
        self._client.close()


def _cpu_seconds(pid: int) -> float:
    """By the process' own clock, in nanoseconds; /proc/PID/stat counts in hundredths of a second."""
    return time.clock_gettime((~pid << 3) | CPU_CLOCK)


@contextmanager
def exporting(collector: Collector, **more: str) -> Iterator[None]:
    """What is started inside exports its spans; ``more`` are other variables of OpenTelemetry's."""
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **more}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


@asynccontextmanager
async def stack() -> AsyncIterator[Stack]:
    with tempfile.TemporaryDirectory() as name:
        async with EmbeddedValkey(Path(name) / "data") as valkey:
            with Stack(valkey.url, Path(name), log_level="warning") as running:
                yield running


async def measure_model(collector: Collector, pairs: int, steps: int) -> dict[str, float]:
    """Milliseconds of a job on the bundled model; kept and not kept take turns, and turns at going first.

    ``noise`` is the standard error of what is added: less than that these clocks cannot tell.
    """
    took: dict[str, list[float]] = {"plain": [], "traced": []}
    worked: dict[str, list[float]] = {"plain": [], "traced": []}
    async with stack() as running:
        # So soon that what it costs counts for the job that it is of.
        with exporting(collector, OTEL_BSP_SCHEDULE_DELAY="100"):
            service = Service(running, "auto")
        for number in range(-WARM, pairs):
            for way in sorted(took, reverse=bool(number % 2)):
                before = sum(service.cpu_seconds().values())
                flags = "01" if way == "traced" else "00"
                milliseconds = service.call(steps, f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{flags}")
                if number >= 0:
                    took[way].append(milliseconds)
                    worked[way].append((sum(service.cpu_seconds().values()) - before) * 1000)
        service.close()
    figures = {}
    for name, values in (("model", took), ("model_cpu", worked)):
        added = [traced - plain for plain, traced in zip(values["plain"], values["traced"], strict=True)]
        figures |= {f"{name}_{way}_ms": round(statistics.median(of_way), 1) for way, of_way in values.items()}
        figures[f"{name}_added_ms"] = round(statistics.median(added), 2)
        figures[f"{name}_noise_ms"] = round(statistics.stdev(added) / len(added) ** 0.5, 2)
    return figures


async def measure_cpu(collector: Collector, blocks: int) -> dict[str, float]:
    """Microseconds of CPU in gateway and worker for a job of the fake engine, and its spans."""
    used: dict[tuple[str, str], list[float]] = defaultdict(list)
    collector.clear()
    async with stack() as running:
        services = {"plain": Service(running, "fake", "plain")}
        with exporting(collector):
            services["traced"] = Service(running, "fake", "traced")
        for number in range(-WARM, blocks):
            for way, service in services.items():
                before = service.cpu_seconds()
                for _ in range(BLOCK):
                    service.call(steps=20)
                for process, seconds in service.cpu_seconds().items():
                    if number >= 0:
                        used[way, process].append((seconds - before[process]) / BLOCK * 1e6)
        for service in services.values():
            service.close()
    # The services have ended, and have exported what they had.
    figures = {}
    for process in ("gateway", "worker"):
        plain, traced = (statistics.median(used[way, process]) for way in ("plain", "traced"))
        figures |= {
            f"{process}_plain_us": round(plain),
            f"{process}_traced_us": round(traced),
            f"{process}_added_us": round(traced - plain),
        }
    return figures | {
        "added_cpu_us_per_job": figures["gateway_added_us"] + figures["worker_added_us"],
        "spans_per_job": round(len(collector.spans) / ((WARM + blocks) * BLOCK), 1),
    }


async def measure(quick: bool) -> dict[str, float]:
    with collecting() as collector:
        figures = await measure_model(collector, pairs=8 if quick else 40, steps=4 if quick else 20)
        figures |= await measure_cpu(collector, blocks=5 if quick else 20)
    share = figures["added_cpu_us_per_job"] / 1000 / figures["model_plain_ms"]
    return figures | {"share_of_model_job": round(share, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer jobs, of fewer steps")
    figures = uvloop.run(measure(parser.parse_args().quick))
    print(f"\n{'':34}{'no traces':>12}{'all traced':>12}{'added':>9}")
    rows = (
        ("job of the bundled model, ms", "model_{}_ms"),
        ("CPU of that job, ms", "model_cpu_{}_ms"),
        ("CPU of a fake job, gateway, us", "gateway_{}_us"),
        ("CPU of a fake job, worker, us", "worker_{}_us"),
    )
    for label, name in rows:
        plain, traced, added = (figures[name.format(way)] for way in ("plain", "traced", "added"))
        print(f"{label:34}{plain:12g}{traced:12g}{added:9g}")
    share, noise = figures["share_of_model_job"], (figures["model_noise_ms"], figures["model_cpu_noise_ms"])
    print("\nThe first two lines have a standard error of {:g} and {:g} ms.".format(*noise))
    print(f"{figures['spans_per_job']:g} spans a job; their CPU is {share:.2%} of a job of the model")
    print(json.dumps({"bench": "tracing", **figures}))


if __name__ == "__main__":
    main()
