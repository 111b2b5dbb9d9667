"""What the service adds to an upstream: one call through it beside the same call made directly, and many at once.

Starts a Valkey (append-only file, synced on every write), the stand-in for Cloudflare's API (tests/upstream), one
gateway and one worker with the `cloudflare` engine, and calls Cloudflare's route of both over real ports:

* sequential synchronous calls with one body, taking turns: straight to the stand-in, and through the service;
* jobs a second with as many calls at once as the engine makes (64), each of which the stand-in holds for half a second,
  both ways.

    python bench/proxy.py [--quick]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gateway import Call, HttpConnection, concurrent, percentiles, sequential
from img2img.embedded import EmbeddedValkey
from tests.stack import MODEL_PATH, Gateway, Stack
from tests.upstream.running import UpstreamProcess

SLOTS: Final = 64
HELD_SECONDS: Final = 0.5
BOUND: Final = SLOTS / HELD_SECONDS
PATH: Final = MODEL_PATH.format(account="local")
BODY: Final = json.dumps({"prompt": "a lion", "num_steps": 20, "seed": 1, "width": 256, "height": 256}).encode()
NO_LIMITS: Final = {"model": 10**6, "model_seconds": 60.0, "token": 10**6, "token_seconds": 300.0}
MANY: Final = {"upstream_account_calls": str(10**6), "upstream_token_calls": str(10**6)}
AUTHORIZATION: Final = {"authorization": "Bearer bench"}


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[UpstreamProcess, Gateway]]:
    """The stand-in, and a gateway with one worker that calls it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upstream = UpstreamProcess(folder / "upstream.log")
        try:
            upstream.set("limits", **NO_LIMITS)
            async with EmbeddedValkey(folder / "data") as valkey:
                with Stack(valkey.url, folder, log_level="warning", **upstream.settings(**MANY)) as stack:
                    stack.worker(log_level="info")
                    yield upstream, stack.gateway(log_level="info")
        finally:
            upstream.close()


async def connect(port: int, count: int) -> list[HttpConnection]:
    connections = [HttpConnection("127.0.0.1", port, AUTHORIZATION) for _ in range(count)]
    for connection in connections:
        await connection.open()
    return connections


def calls_of(connections: list[HttpConnection]) -> list[Call]:
    return [lambda c=c: c.request("POST", PATH, BODY) for c in connections]  # type: ignore[misc]


async def measure_latency(upstream: UpstreamProcess, gateway: Gateway, count: int) -> dict[str, float]:
    """Both ways in turn, so that a slow minute of the machine meets both."""
    ports = {"direct": upstream.port, "service": int(gateway.http.rpartition(":")[2])}
    connections = {name: (await connect(port, 1))[0] for name, port in ports.items()}
    took: dict[str, list[float]] = {name: [] for name in ports}
    for round_number in range(count + 20):
        for name, call in zip(connections, calls_of(list(connections.values())), strict=True):
            (milliseconds,) = await sequential(call, 1)
            if round_number >= 20:
                took[name].append(milliseconds)
    for connection in connections.values():
        connection.close()
    added = [service - direct for service, direct in zip(took["service"], took["direct"], strict=True)]
    return percentiles("direct", took["direct"]) | percentiles("service", took["service"]) | percentiles("added", added)


async def measure_throughput(upstream: UpstreamProcess, gateway: Gateway, count: int) -> dict[str, float]:
    """Jobs a second while the upstream takes half a second for each: straight to it, and through the service.

    The service has twice as many callers as it makes calls, so that there is always a job waiting.
    """
    upstream.set("delay", seconds=HELD_SECONDS)
    direct = await rate_of(upstream.port, SLOTS, warm=SLOTS, count=count)
    port = int(gateway.http.rpartition(":")[2])
    # The engine finds out how many calls at once are good, meanwhile.
    await rate_of(port, 2 * SLOTS, warm=0, count=6 * SLOTS)
    upstream.set("reset")
    upstream.set("limits", **NO_LIMITS)
    service = await rate_of(port, 2 * SLOTS, warm=2 * SLOTS, count=count)
    figures = {"direct_jobs_per_s": round(direct, 1), "jobs_per_s": round(service, 1), "bound_jobs_per_s": BOUND}
    return figures | {"most_calls_at_once": float(upstream.limits()["most_open"])}


async def rate_of(port: int, callers: int, warm: int, count: int) -> float:
    """Calls a second of so many ``callers``, over ``count`` calls after ``warm`` others."""
    connections = await connect(port, callers)
    calls = calls_of(connections)
    if warm:
        await concurrent(calls, warm)
    rate = await concurrent(calls, count)
    for connection in connections:
        connection.close()
    return rate


async def measure(quick: bool) -> dict[str, float]:
    async with proxy() as (upstream, gateway):
        latency = await measure_latency(upstream, gateway, 100 if quick else 1000)
    # Started anew: a worker that is used to quick answers would take slow ones for a sign of overload.
    async with proxy() as (upstream, gateway):
        return latency | await measure_throughput(upstream, gateway, 512 if quick else 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    figures = uvloop.run(measure(parser.parse_args().quick))
    print(f"\n{'sequential call':26}{'p50 ms':>9}{'p99 ms':>9}")
    for name, label in (
        ("direct", "straight to the upstream"),
        ("service", "through the service"),
        ("added", "added by it, call by call"),
    ):
        print(f"{label:26}{figures[f'{name}_p50_ms']:9.2f}{figures[f'{name}_p99_ms']:9.2f}")
    print(
        f"\nwith {HELD_SECONDS:g} s upstream, {SLOTS} calls at once ({BOUND:g} jobs/s at most): "
        f"{figures['direct_jobs_per_s']} jobs/s straight, {figures['jobs_per_s']} through the service"
    )
    print(json.dumps({"bench": "proxy", **figures}))


if __name__ == "__main__":
    main()
