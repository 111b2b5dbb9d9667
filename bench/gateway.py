"""What the service itself costs: ingest of a picture, and a job's way through it with an engine that takes no time.

Starts a Valkey (append-only file, synced on every write, as `img2img up` does), one gateway and one worker with the
`fake` engine, and calls them over real ports from this process:

* a sequential synchronous call, p50 and p99, over Cloudflare's route and gRPC `Generate`, beside a GET of
  /health/live on the same connection (what HTTP alone costs) and the time the job itself took on its worker;
* jobs a second with 32 callers at once, over both.

    python bench/gateway.py [--quick]
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.ingest import measure_layouts
from img2img.client import AsyncClient
from img2img.embedded import EmbeddedValkey
from tests.stack import MODEL_PATH, Gateway, Stack

CALLERS: Final = 32
BODY: Final = json.dumps({"prompt": "a lion", "num_steps": 20, "seed": 1}).encode()
PATH: Final = MODEL_PATH.format(account="local")

Call = Callable[[], Awaitable[object]]


class HttpConnection:
    """HTTP/1.1 with nothing to spare, so that the caller's own cost stays small beside what it measures."""

    def __init__(self, host: str, port: int, headers: Mapping[str, str] = {}) -> None:
        self._host, self._port = host, port
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        self._writer.close()

    async def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nhost: bench\r\n{self._headers}content-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return await self._reader.readexactly(int(length.partition(b":")[2]))


@asynccontextmanager
async def service(slots: int) -> AsyncIterator[Gateway]:
    """A gateway with one worker of ``slots`` slots."""
    with tempfile.TemporaryDirectory() as folder:
        async with EmbeddedValkey(Path(folder) / "data") as valkey:
            with Stack(valkey.url, Path(folder), log_level="warning", max_job_age="600") as stack:
                stack.worker(concurrency=str(slots), log_level="info")
                yield stack.gateway(log_level="info")


async def sequential(call: Call, count: int) -> list[float]:
    """Milliseconds of each of ``count`` calls, one after another."""
    took = []
    for _ in range(count):
        started = time.perf_counter()
        await call()
        took.append((time.perf_counter() - started) * 1000)
    return took


async def concurrent(calls: list[Call], count: int) -> float:
    """Calls a second with every caller busy until ``count`` are done."""
    left = count

    async def caller(call: Call) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await call()

    started = time.perf_counter()
    await asyncio.gather(*(caller(call) for call in calls))
    return count / (time.perf_counter() - started)


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {f"{name}_p50_ms": round(statistics.median(ordered), 2), f"{name}_p99_ms": round(p99, 2)}


async def measure_latency(count: int) -> dict[str, float]:
    async with service(slots=1) as gateway:
        http = HttpConnection("127.0.0.1", int(gateway.http.rpartition(":")[2]))
        await http.open()
        async with AsyncClient(gateway.grpc) as grpc:
            calls: dict[str, Call] = {
                "live": lambda: http.request("GET", "/health/live"),
                "rest": lambda: http.request("POST", PATH, BODY),
                "grpc": lambda: grpc.generate(prompt="a lion", num_steps=20, seed=1),
            }
            figures: dict[str, float] = {}
            for name, call in calls.items():
                await sequential(call, 20)
                figures |= percentiles(name, await sequential(call, count))
            jobs = (await grpc.list(limit=100)).jobs
            inside = [1000 * sum(job.timings.values()) for job in jobs if job.timings]
            figures |= percentiles("job", inside)
        http.close()
    figures["rest_over_job_p50_ms"] = round(figures["rest_p50_ms"] - figures["job_p50_ms"], 2)
    figures["grpc_over_job_p50_ms"] = round(figures["grpc_p50_ms"] - figures["job_p50_ms"], 2)
    figures["rest_vs_live"] = round(figures["rest_p50_ms"] / figures["live_p50_ms"], 1)
    return figures


async def measure_throughput(count: int) -> dict[str, float]:
    async with service(slots=8) as gateway:
        port = int(gateway.http.rpartition(":")[2])
        connections = [HttpConnection("127.0.0.1", port) for _ in range(CALLERS)]
        for connection in connections:
            await connection.open()
        rest: list[Call] = [lambda c=c: c.request("POST", PATH, BODY) for c in connections]  # type: ignore[misc]
        await concurrent(rest, CALLERS * 2)
        figures = {"rest_jobs_per_s": round(await concurrent(rest, count), 1)}
        for connection in connections:
            connection.close()
        async with AsyncClient(gateway.grpc) as client:
            grpc: list[Call] = [lambda: client.generate(prompt="a lion", num_steps=20, seed=1)] * CALLERS
            await concurrent(grpc, CALLERS * 2)
            figures["grpc_jobs_per_s"] = round(await concurrent(grpc, count), 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls and rounds")
    quick = parser.parse_args().quick
    ingest = measure_layouts(rounds=5 if quick else 21)
    latency = uvloop.run(measure_latency(100 if quick else 500))
    throughput = uvloop.run(measure_throughput(200 if quick else 2000))
    print(f"\n{'sequential call':22}{'p50 ms':>9}{'p99 ms':>9}")
    for name, label in (
        ("live", "GET /health/live"),
        ("rest", "Cloudflare route"),
        ("grpc", "gRPC Generate"),
        ("job", "the job itself"),
    ):
        print(f"{label:22}{latency[f'{name}_p50_ms']:9.2f}{latency[f'{name}_p99_ms']:9.2f}")
    print(
        f"\n{CALLERS} callers: REST {throughput['rest_jobs_per_s']} jobs/s, gRPC {throughput['grpc_jobs_per_s']} jobs/s"
    )
    print(json.dumps({"bench": "gateway", **ingest, **latency, **throughput}))


if __name__ == "__main__":
    main()
