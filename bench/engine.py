"""What taking steps of many jobs together is worth: our engine beside diffusers' pipelines, on one trace.

The systems are (a) diffusers' pipelines, one job after another; (b) the same with a compiled UNet; (c) the same in
batches: what waits with equal parameters shares a call; (d) ours. Each runs in a process of its own, with the same
jobs, seeds, sampler, number format and arrivals. The trace mixes sizes, steps, strengths and guidance; a load of 1 is
what (a) makes when all of it comes at once. Where there is no C++ compiler, (b) is left out.

    python bench/engine.py [--quick] [--device cpu|cuda] [--seed N] [--max-rows N]

On the CPU with the bundled model; on CUDA with random weights in Stable Diffusion 1.5's shape (its speed does not
depend on their values), which are made once, in .cache/bench/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from PIL import Image, ImageChops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.engine_trace import Arrival, Job, Size, at_once, equal_jobs, mixed_jobs, poisson, warm_up_jobs

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / ".cache" / "bench"
LABELS: Final = {
    "one": "(a) pipelines, one by one",
    "compiled": "(b) the same, compiled",
    "batches": "(c) batches of equal jobs",
    "ours": "(d) ours",
}
ALL_AT_ONCE: Final = "all at once"
EQUAL: Final = "equal jobs at once"


class Plan(msgspec.Struct, frozen=True):
    """What is measured: ``jobs`` of the trace for each of ``loads``, its throughput ``rounds`` times, ``equal`` jobs,
    ``alone`` single jobs for each system in turn, and ``cancels``."""

    model: str
    sizes: Mapping[Size, int]
    systems: tuple[str, ...] = tuple(LABELS)
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)
    jobs: int = 32
    rounds: int = 3
    equal: int = 8
    alone: int = 11
    cancels: int = 40

    @property
    def native(self) -> Size:
        return next(iter(self.sizes))


CPU: Final = Plan("emoji-sd", {(256, 256): 7, (320, 256): 2, (384, 384): 1})
CUDA: Final = Plan(str(CACHE / "sd15-random"), {(512, 512): 7, (640, 512): 2, (768, 768): 1}, jobs=60, equal=32)
QUICK: Final[dict[str, Any]] = {
    "systems": ("one", "batches", "ours"),
    "loads": (1.2,),
    "jobs": 6,
    "rounds": 1,
    "equal": 0,
    "alone": 3,
    "cancels": 5,
}


class Child:
    """One system in a process of its own."""

    def __init__(self, name: str, device: str, plan: Plan, max_rows: int, folder: Path) -> None:
        self._log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "bench.engine_systems", name, device, plan.model, str(max_rows)]

    def __enter__(self) -> Self:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
            # As the engine sets it for itself: else the pipelines would be slow for beside whom they run.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def send(self, do: str, arrivals: Sequence[Arrival] = (), **more: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode({"do": do, "arrivals": arrivals, **more}) + b"\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended:\n{self._log.read_text()}")
        return msgspec.json.decode(line, type=dict[str, Any])

    def ask(self, do: str, arrivals: Sequence[Arrival] = (), **more: object) -> dict[str, Any]:
        self.send(do, arrivals, **more)
        return self.receive()


Systems = Mapping[str, Child]
Rows = dict[str, dict[str, float]]
"""Figures by system."""


def start_all(stack: ExitStack, device: str, plan: Plan, max_rows: int, folder: Path) -> Systems:
    """The systems that can be had here, warm."""
    children = {name: stack.enter_context(Child(name, device, plan, max_rows, folder)) for name in plan.systems}
    for child in children.values():
        child.send("warm", at_once(warm_up_jobs(plan.sizes)))
    for name in list(children):
        if missing := children[name].receive()["missing"]:
            print(f"{LABELS[name]} is left out: {missing}")
            del children[name]
        else:
            log(f"{LABELS[name]} is warm")
    return children


def measure_throughput(systems: Systems, plan: Plan, jobs: list[Job], folder: Path) -> Rows:
    """Everything at once, the systems in turn; the first round's pictures stay in folders named for the systems."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for number in range(plan.rounds):
        for name, child in systems.items():
            pictures = folder / name
            pictures.mkdir(exist_ok=True)
            told = child.ask("serve", at_once(jobs), folder=None if number else str(pictures))
            found[name].append(figures(told))
        log(f"{ALL_AT_ONCE}, round {number + 1}: {shown({name: rows[-1] for name, rows in found.items()})}")
    return {name: medians(rows) for name, rows in found.items()}


def measure_load(systems: Systems, arrivals: list[Arrival]) -> Rows:
    return {name: figures(child.ask("serve", arrivals)) for name, child in systems.items()}


def measure_alone(systems: Systems, plan: Plan) -> dict[str, float]:
    """Median seconds of a job that is alone, the systems in turn."""
    took: dict[str, list[float]] = {name: [] for name in systems if name != "batches"}
    for job in equal_jobs(plan.alone, plan.native):
        for name, seconds in took.items():
            seconds.append(systems[name].ask("serve", at_once([job]))["seconds"])
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def measure_all(systems: Systems, plan: Plan, seed: int, folder: Path) -> dict[str, Any]:
    jobs = mixed_jobs(plan.jobs, plan.sizes, seed)
    runs = {ALL_AT_ONCE: measure_throughput(systems, plan, jobs, folder)}
    capacity = runs[ALL_AT_ONCE]["one"]["images_per_s"]
    for load in plan.loads:
        name = f"load {load}"
        runs[name] = measure_load(systems, poisson(jobs, load * capacity, seed))
        log(f"{name}: {shown(runs[name])}")
    if plan.equal:
        runs[EQUAL] = measure_load(systems, at_once(equal_jobs(plan.equal, plan.native)))
        log(f"{EQUAL}: {shown(runs[EQUAL])}")
    alone = measure_alone(systems, plan)
    cancel = systems["ours"].ask("cancel", at_once(jobs), count=plan.cancels)["seconds"]
    return {
        "runs": runs,
        "alone_s": {name: round(seconds, 4) for name, seconds in alone.items()},
        "cancel_p50_ms": round(1000 * statistics.median(cancel), 1),
        "cancel_p99_ms": round(1000 * at_99(cancel), 1),
        "peak_mib": {name: round(child.ask("memory")["mib"]) for name, child in systems.items()},
        "levels_apart": {name: furthest(folder / "one", folder / name) for name in systems},
    }


def figures(told: dict[str, Any]) -> dict[str, float]:
    latencies = told["latencies"]
    return {
        "images_per_s": round(len(latencies) / told["seconds"], 3),
        "p50_s": round(statistics.median(latencies), 3),
        "p99_s": round(at_99(latencies), 3),
        "core_s_per_image": round(told["core_seconds"] / len(latencies), 3),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def at_99(values: Sequence[float]) -> float:
    return sorted(values)[round(0.99 * (len(values) - 1))]


def furthest(folder: Path, other: Path) -> int:
    """By how many of 255 levels two folders' pictures differ at most."""
    differences = [
        ImageChops.difference(Image.open(path), Image.open(other / path.name)) for path in folder.glob("*.png")
    ]
    return max(high for difference in differences for _, high in difference.getextrema())  # type: ignore[misc]


def goals(found: dict[str, Any], device: str) -> dict[str, float]:
    """Ours over the others: images a second; their seconds over ours for a job alone, and of the CPU's cores for a
    picture, which other work on the machine changes least."""
    runs, alone = found["runs"], found["alone_s"]
    cores = {name: row["core_s_per_image"] for name, row in runs[ALL_AT_ONCE].items()}

    def over(run: str, other: str) -> float:
        return round(runs[run]["ours"]["images_per_s"] / runs[run][other]["images_per_s"], 2)

    ratios = {
        "alone_vs_one": round(alone["one"] / alone["ours"], 2),
        "at_once_vs_one": over(ALL_AT_ONCE, "one"),
        "at_once_vs_batches": over(ALL_AT_ONCE, "batches"),
        "overload_vs_batches": over("load 1.2", "batches"),
    }
    if device == "cpu":
        ratios |= {f"cores_vs_{name}": round(cores[name] / cores["ours"], 2) for name in ("one", "batches")}
    if "compiled" in alone:
        ratios["alone_vs_compiled"] = round(alone["compiled"] / alone["ours"], 2)
        ratios["at_once_vs_compiled"] = over(ALL_AT_ONCE, "compiled")
    if device == "cuda" and EQUAL in runs:
        ratios["equal_images_per_s"] = runs[EQUAL]["ours"]["images_per_s"]
    return ratios


GOALS: Final[Mapping[str, Mapping[str, float]]] = {
    "cpu": {"alone_vs_one": 0.95, "at_once_vs_batches": 1.0, "overload_vs_batches": 1.0},
    "cuda": {"equal_images_per_s": 10.0, "at_once_vs_one": 3.5, "alone_vs_compiled": 1.0},
}


def print_tables(found: dict[str, Any], device: str) -> None:
    for run, rows in found["runs"].items():
        print(f"\n{run:28}{'images/s':>10}{'p50 s':>9}{'p99 s':>9}{'core s/image':>14}")
        for name, row in rows.items():
            print(
                f"{LABELS[name]:28}{row['images_per_s']:10.3f}{row['p50_s']:9.2f}{row['p99_s']:9.2f}{row['core_s_per_image']:14.3f}"
            )
    print(f"\n{'':28}{'alone s':>10}{'peak MiB':>10}{'levels from (a)':>17}")
    for name, memory in found["peak_mib"].items():
        alone = f"{found['alone_s'][name]:10.3f}" if name in found["alone_s"] else f"{'':10}"
        print(f"{LABELS[name]:28}{alone}{memory:10}{found['levels_apart'][name]:17}")
    print(f"\ncancel beside other jobs: p50 {found['cancel_p50_ms']} ms, p99 {found['cancel_p99_ms']} ms")
    for name, ratio in found["ratios"].items():
        goal = GOALS[device].get(name)
        print(f"{name}: {ratio}{'' if goal is None else f' (goal {goal})'}")


def shown(rows: Rows) -> str:
    return ", ".join(f"{name} {row['images_per_s']:.3f}/s" for name, row in rows.items())


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_weights(folder: str) -> None:
    """Random weights in Stable Diffusion 1.5's shape, unless they are there."""
    if not Path(folder).exists():
        log(f"making random weights in {folder}")
        subprocess.run([sys.executable, "-m", "bench.engine_weights", folder], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="(a), (c) and (d), one load, few jobs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=7, help="of the trace (7)")
    parser.add_argument("--max-rows", type=int, default=0, help="rows of a pass of ours (what suits the device)")
    options = parser.parse_args()
    plan = CUDA if options.device == "cuda" else CPU
    if options.quick:
        plan = msgspec.structs.replace(plan, **QUICK)
    if options.device == "cuda":
        make_weights(plan.model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        systems = start_all(stack, options.device, plan, options.max_rows, folder)
        found = measure_all(systems, plan, options.seed, folder)
    found["ratios"] = goals(found, options.device)
    print_tables(found, options.device)
    print(json.dumps({"bench": "engine", "device": options.device, "seed": options.seed, **found}))


if __name__ == "__main__":
    main()
