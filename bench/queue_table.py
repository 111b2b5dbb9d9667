"""Our queue beside others on the same server: the work behind ``python bench/queue.py``.

Each peer runs in an environment of its own (.cache/bench/<peer>, made on demand) with one worker process and one
producer process on a fresh server. For each setting of ``appendfsync``:

* jobs/s: N no-op jobs, 20 submissions under way at once, from the first submission until the last one begins, on
  a worker that is already there (so the time to submit is included);
* pick-up: a submission begun until the job's function begins, sequentially, on an idle worker;
* result: a submission begun until the caller holds the result, in the peer's own way of waiting for it;
* idle commands/s: what an idle worker sends, counted by MONITOR.

Ours, arq and the leading peers run in several rounds, in turn with the others; the figures are medians of rounds.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from bench.valkey import CACHE, commands_per_second, fresh_server

SCRIPTS: Final = Path(__file__).resolve().parent / "peers"
DURABILITIES: Final = ("everysec", "always")
START_SECONDS: Final = 2.0
STOP_SECONDS: Final = 5.0
LONGEST: Final = 240.0
NOTES_SIZE: Final = 8 * 100_000
QUICK_NAMES: Final = ("ours", "arq", "arq-fast", "saq")
DECIMALS: Final = {"jobs_per_s": 0, "pickup_p50_ms": 2, "pickup_p99_ms": 2, "result_p50_ms": 2, "result_p99_ms": 2}


class Peer(msgspec.Struct, frozen=True):
    """How a library is installed and run; ``packages`` are empty for ours, which uses this environment."""

    name: str
    label: str
    script: str
    packages: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    repeated: bool = False
    stores: bool = True
    slow: bool = False
    """Polls so seldom that latencies are taken once and from fewer jobs."""


SAQ: Final = ("saq[redis,hiredis]==0.26.4", "typing_extensions", "uvloop")
ARQ: Final = ("arq==0.28.0", "redis[hiredis]<6", "uvloop")
TASKIQ: Final = ("taskiq==0.13.0", "taskiq-redis==1.2.4", "hiredis", "uvloop")
DRAMATIQ: Final = ("dramatiq[redis]==2.2.1", "hiredis")
FAST: Final = {"BENCH_FAST": "1"}
STREAM: Final = {"BENCH_STREAM": "1"}
RESULTS: Final = {"BENCH_RESULTS": "1"}
PEERS: Final = (
    Peer("ours", "ours", "ours.py", repeated=True),
    Peer("arq", "arq 0.28.0", "with_arq.py", ARQ, repeated=True, slow=True),
    Peer("arq-fast", "arq, poll 10 ms, 100 jobs", "with_arq.py", ARQ, FAST, repeated=True),
    Peer("saq", "SAQ 0.26.4", "with_saq.py", SAQ, repeated=True),
    Peer("taskiq-list", "taskiq-redis 1.2.4, list", "with_taskiq.py", TASKIQ),
    Peer("taskiq-stream", "taskiq-redis 1.2.4, stream", "with_taskiq.py", TASKIQ, STREAM, repeated=True),
    Peer("streaq", "streaq 7.2.0", "with_streaq.py", ("streaq==7.2.0", "hiredis", "uvloop")),
    Peer("dramatiq", "dramatiq 2.2.1, with results", "with_dramatiq.py", DRAMATIQ, RESULTS, repeated=True),
    Peer("dramatiq-bare", "dramatiq 2.2.1, no results", "with_dramatiq.py", DRAMATIQ, stores=False),
    Peer("rq", "rq 3.0.0, simple worker", "with_rq.py", ("rq==3.0.0", "hiredis")),
    Peer("celery", "celery 5.7.0, 20 threads", "with_celery.py", ("celery[redis]==5.7.0", "hiredis")),
)  # fmt: skip


class Plan(msgspec.Struct, frozen=True):
    """How much is measured; ``slow`` is for peers that poll seldom."""

    rounds: int
    jobs: int
    latencies: int
    slow_jobs: int
    slow_latencies: int
    idle_seconds: float


FULL: Final = Plan(rounds=3, jobs=3000, latencies=200, slow_jobs=2000, slow_latencies=200, idle_seconds=10.0)
QUICK: Final = Plan(rounds=1, jobs=1000, latencies=60, slow_jobs=300, slow_latencies=6, idle_seconds=5.0)


def install(peer: Peer) -> str:
    """The Python of the peer's environment, which is made if it is not there or has other packages."""
    if not peer.packages:
        return sys.executable
    folder = CACHE / peer.script.removeprefix("with_").removesuffix(".py")
    python, stamp, wanted = folder / "bin" / "python", folder / "installed", "\n".join(peer.packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        log(f"installing {' '.join(peer.packages)}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return str(python)


class Run:
    """One peer on one fresh server: its worker, and the producer's measurements."""

    def __init__(self, peer: Peer, url: str, folder: Path) -> None:
        self._command = [install(peer), str(SCRIPTS / peer.script)]
        self._notes, self._log = folder / "notes", folder / "log"
        self._environment = {
            **os.environ,
            **peer.environment,
            "BENCH_URL": url,
            "BENCH_NOTES": str(self._notes),
            "BENCH_WARM_UP": "2" if peer.slow else "20",
        }

    async def __aenter__(self) -> Self:
        """Start the worker."""
        self._notes.write_bytes(bytes(NOTES_SIZE))
        self._worker = await self._start("worker", stdout=subprocess.DEVNULL)
        # SAQ aborts what it finds in the queue at its start.
        await asyncio.sleep(START_SECONDS)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end(self._worker)

    async def produce(self, mode: str, jobs: int) -> dict[str, Any]:
        """Have the producer measure, as long as the worker lives."""
        producer = await self._start(mode, str(jobs), stdout=subprocess.PIPE)
        answer = asyncio.create_task(producer.communicate())
        died = asyncio.create_task(self._worker.wait())
        await asyncio.wait({answer, died}, timeout=LONGEST, return_when=asyncio.FIRST_COMPLETED)
        if producer.returncode != 0:
            await self._end(producer)
            raise RuntimeError(f"{self._command[1]} {mode} failed or hung:\n{self._log.read_text()}")
        died.cancel()
        return msgspec.json.decode((await answer)[0], type=dict[str, Any])

    async def _start(self, *arguments: str, stdout: int) -> Process:
        with self._log.open("ab") as errors:
            return await asyncio.create_subprocess_exec(
                *self._command, *arguments, env=self._environment, stdout=stdout, stderr=errors
            )

    @staticmethod
    async def _end(process: Process) -> None:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def measure(peer: Peer, durability: str, plan: Plan, first: bool) -> dict[str, float]:
    """One round of one peer; what is slow or steady is taken in the first round only."""
    figures: dict[str, float] = {}
    jobs, latencies = (plan.slow_jobs, plan.slow_latencies) if peer.slow else (plan.jobs, plan.latencies)
    with tempfile.TemporaryDirectory() as folder:
        async with fresh_server(durability) as url, Run(peer, url, Path(folder)) as run:
            if first or not peer.slow:
                for name, values in (await run.produce("latency", latencies)).items():
                    if name != "result" or peer.stores:
                        figures |= percentiles(name, values)
            burst = await run.produce("burst", jobs)
            figures["jobs_per_s"] = jobs / burst["seconds"]
            figures["submits_per_s"] = jobs / burst["submit_seconds"]
    return figures


async def measure_idle(peer: Peer, seconds: float) -> float:
    """Commands a second of a worker that has nothing to do, from a second after it showed that it is up."""
    with tempfile.TemporaryDirectory() as folder:
        async with fresh_server("everysec") as url, Run(peer, url, Path(folder)) as run:
            await run.produce("latency", 1)
            await asyncio.sleep(1)
            return await commands_per_second(url, seconds)


def percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1000 * value for value in seconds)
    return {
        f"{name}_p50_ms": statistics.median(ordered),
        f"{name}_p99_ms": ordered[round(0.99 * (len(ordered) - 1))],
    }


async def measure_all(peers: list[Peer], durability: str, plan: Plan) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by peer. The idle workers are watched all at once."""
    async with asyncio.TaskGroup() as group:
        idle = [group.create_task(measure_idle(peer, plan.idle_seconds), name=peer.name) for peer in peers]
    rounds: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
    for number in range(plan.rounds):
        for peer in peers:
            if number == 0 or peer.repeated:
                figures = await measure(peer, durability, plan, first=number == 0)
                rounds[peer.name].append(figures)
                shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
                log(f"{durability}, round {number + 1}, {peer.label}: {shown}")
    return {
        peer.name: medians(rounds[peer.name]) | {"idle_commands_per_s": round(commands.result(), 2)}
        for peer, commands in zip(peers, idle, strict=True)
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    found = {name: [figures[name] for figures in rounds if name in figures] for name in DECIMALS}
    return {name: round(statistics.median(values), DECIMALS[name]) for name, values in found.items() if values}


def table(peers: list[Peer], figures: dict[str, dict[str, float]]) -> None:
    """One line a peer; the ratios are ours over the peer's jobs/s, and the peer's pick-up and result over ours."""
    print(
        f"{'':30}{'jobs/s':>8}{'pick-up p50/p99 ms':>20}{'result p50/p99 ms':>20}{'idle/s':>8}"
        "   ours is better by: jobs/s, pick-up, result"
    )
    ours = figures.get("ours")
    for peer in peers:
        one = figures[peer.name]
        line = f"{peer.label:30}{one['jobs_per_s']:8.0f}"
        for name in ("pickup_p50_ms", "pickup_p99_ms", "result_p50_ms", "result_p99_ms"):
            line += f"{one[name]:10.2f}" if name in one else f"{'-':>10}"
        line += f"{one['idle_commands_per_s']:8.1f}"
        if ours is not None and peer.name != "ours":
            line += f"{ours['jobs_per_s'] / one['jobs_per_s']:8.2f}x"
            line += "".join(
                f"{one[name] / ours[name]:8.1f}x" for name in ("pickup_p50_ms", "result_p50_ms") if name in one
            )
        print(line)


def summary(peers: list[Peer], durability: str, figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours under the given setting, and its ratios; keys end with it."""
    if "ours" not in figures:
        return {}
    result: dict[str, float] = {f"{name}_{durability}": value for name, value in figures["ours"].items()}
    jobs = {peer.name: figures[peer.name]["jobs_per_s"] for peer in peers if peer.name != "ours"}
    storing = [jobs[peer.name] for peer in peers if peer.stores and peer.name != "ours"]
    if "arq" in jobs:
        result[f"jobs_per_s_vs_arq_{durability}"] = round(figures["ours"]["jobs_per_s"] / jobs["arq"], 2)
    if storing:
        result[f"jobs_per_s_vs_best_peer_{durability}"] = round(figures["ours"]["jobs_per_s"] / max(storing), 2)
    return result


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_all(peers: list[Peer], durabilities: tuple[str, ...], plan: Plan) -> dict[str, object]:
    """Measure, print the tables, and return the figures. Those of ours with no suffix are synced always."""
    summaries: dict[str, float] = {}
    found: dict[str, object] = {}
    for durability in durabilities:
        figures = asyncio.run(measure_all(peers, durability, plan))
        print(f"\nappendfsync {durability}")
        table(peers, figures)
        summaries |= summary(peers, durability, figures)
        found[durability] = figures
    plain = {name.removesuffix("_always"): value for name, value in summaries.items() if name.endswith("_always")}
    return {**plain, **summaries, "peers": found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Our queue beside others, on the same server")
    parser.add_argument("--quick", action="store_true", help="ours, arq and SAQ, one short round, synced always")
    parser.add_argument("--only", help=f"names with commas between: {', '.join(peer.name for peer in PEERS)}")
    parser.add_argument("--jobs", type=int, help="jobs in a burst")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.jobs:
        plan = msgspec.structs.replace(plan, jobs=options.jobs, slow_jobs=options.jobs)
    names = options.only.split(",") if options.only else QUICK_NAMES if options.quick else [peer.name for peer in PEERS]
    if unknown := set(names) - {peer.name for peer in PEERS}:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    peers = [peer for peer in PEERS if peer.name in names]
    for peer in peers:
        install(peer)
    figures = run_all(peers, ("always",) if options.quick else DURABILITIES, plan)
    print(json.dumps({"bench": "queue", **figures}))
