"""What should workers be scaled on? A simulated fleet under four rules and three loads: waits, GPU-hours, actions.

The rules: the seconds of work owed (``gateway/scaling.py``, its own formula), the jobs that wait, the jobs that wait
and run, and the GPUs' utilisation. The loads: bursts, a day, and sizes that change while the number of jobs does not.
How fleet and autoscaler behave: bench/fleet.py. Everything is drawn from the seed; every rule gets the same jobs.

    python bench/autoscale.py [--quick] [--seed N] [--plot DIR]
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.charts import Line, chart
from bench.fleet import Fleet, Load, Outcome, Rule, by_average, by_utilisation
from gateway.scaling import busy_workers, demand_seconds

TARGET_WAIT: Final = 30.0
SLOTS: Final = (4, 1)
"""Jobs that a worker runs at once, for one table each."""
UTILISATION: Final = 0.7
MIX: Final = ((2.0, 0.6), (8.0, 0.3), (40.0, 0.1))
"""Seconds of a job, and the share of such jobs."""
OURS: Final = "seconds owed"
WAITING, ALL, BUSY = "jobs waiting", "jobs waiting and running", "GPU utilisation"
COLOURS: Final = {OURS: "#0b62a4", WAITING: "#c0392b", ALL: "#e08e0b", BUSY: "#4b8b3b"}


MEAN: Final = sum(seconds * share for seconds, share in MIX)
SMALL, LARGE, SIZES_RATE = 2.0, 20.0, 0.3
"""Seconds of the jobs that take turns, and how many come a second for each slot of a worker."""
HOUR: Final = 3600.0
HEAD: Final = "load     scaled on                   p50 wait  p95 wait   late   GPU-h   busy  actions"


def drawn(
    length: float, dice: random.Random, rate: Callable[[float], float], seconds: Callable[[float], float]
) -> Load:
    """Jobs at random times, ``rate(t)`` of them a second at the time t, that take ``seconds(t)`` on average."""
    most = max(rate(minute * 60.0) for minute in range(int(length / 60)))
    at, jobs = 0.0, []
    while (at := at + dice.expovariate(most)) < length:
        if dice.random() * most < rate(at):
            jobs.append((at, seconds(at) * dice.uniform(0.7, 1.3)))
    return Load(length, jobs)


def loads(seed: int, slots: int, *, quick: bool) -> dict[str, Load]:
    """What a fleet of workers with ``slots`` gets; a quick day has four hours."""

    def mixed(_: float) -> float:
        return dice.choices([seconds for seconds, _ in MIX], [share for _, share in MIX])[0]

    def workers(number: float) -> float:
        """Jobs of the mix a second that keep so many workers busy."""
        return number * slots / MEAN

    dice, hours, day = random.Random(seed), 3 if quick else 12, (4 if quick else 24) * HOUR
    return {
        "bursts": drawn(hours * HOUR, dice, lambda at: workers(8 if at % 2400 < 600 else 0.1), mixed),
        "day": drawn(day, dice, lambda at: workers(0.2 + 5.8 * (0.5 - 0.5 * math.cos(2 * math.pi * at / day))), mixed),
        "sizes": drawn(
            (4 if quick else 12) * HOUR,
            dice,
            lambda _: slots * SIZES_RATE,
            lambda at: LARGE if at % (2 * HOUR) >= HOUR else SMALL,
        ),
    }


def rules(mean_seconds: float, slots: int) -> list[Rule]:
    """The rules for workers with ``slots``; the one that counts waiting jobs knows beforehand what they take."""
    target = TARGET_WAIT * slots

    def owed(fleet: Fleet) -> int:
        busy = busy_workers(fleet.running, fleet.taking, fleet.taking * slots)
        return by_average(demand_seconds(fleet.backlog, busy, target), target, fleet.wanted)

    def waiting(fleet: Fleet) -> int:
        return by_average(len(fleet.waiting), target / mean_seconds, fleet.wanted)

    def waiting_and_running(fleet: Fleet) -> int:
        return by_average(len(fleet.waiting) + fleet.running, slots, fleet.wanted)

    def utilisation(fleet: Fleet) -> int:
        return by_utilisation(*fleet.utilisations(), UTILISATION, fleet.wanted)

    return [
        Rule(OURS, owed, pushed=True),
        Rule(WAITING, waiting),
        Rule(ALL, waiting_and_running),
        # Of no workers there is no utilisation: it cannot bring the first one.
        Rule(BUSY, utilisation, least=1),
    ]


def figures(load: Load, slots: int, outcome: Outcome) -> dict[str, float]:
    cuts = statistics.quantiles(outcome.waits, n=100, method="inclusive")
    return {
        "jobs": len(outcome.waits),
        "wait_p50_s": round(cuts[49], 1),
        "wait_p95_s": round(cuts[94], 1),
        "late_share": round(sum(wait > TARGET_WAIT for wait in outcome.waits) / len(outcome.waits), 3),
        "gpu_hours": round(outcome.gpu_hours, 1),
        "busy_share": round(load.seconds / slots / 3600 / outcome.gpu_hours, 3),
        "actions": outcome.actions,
    }


def plot(folder: Path, name: str, load: Load, slots: int, outcomes: dict[str, Outcome]) -> None:
    """One picture of a load: workers, and how long the next job has waited, over time."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = Line("work that comes in", "#bbbbbb", [(at / HOUR, workers) for at, workers in load.offered(600.0, slots)])
    samples = {rule: outcome.samples for rule, outcome in reversed(outcomes.items())}  # ours above the others
    panels = {
        "workers": [
            needed,
            *(Line(rule, COLOURS[rule], [(s.at / HOUR, s.workers) for s in seen]) for rule, seen in samples.items()),
        ],
        "wait of the next job, s": [
            Line(rule, COLOURS[rule], [(s.at / HOUR, s.waiting) for s in seen]) for rule, seen in samples.items()
        ],
    }
    (folder / f"autoscale-{name}.svg").write_text(chart(f"Load: {name}", "hours", panels))


def compare(slots: int, arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """All rules under all loads, for workers that run ``slots`` jobs at once; prints them as a table."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"\nWorkers that run {slots} {'jobs' if slots > 1 else 'job'} at once\n{HEAD}")
    for name, load in loads(arguments.seed, slots, quick=arguments.quick).items():
        outcomes = {
            rule.name: Fleet(load, rule, slots, arguments.seed).run() for rule in rules(load.mean_seconds, slots)
        }
        found[name] = {rule: figures(load, slots, outcome) for rule, outcome in outcomes.items()}
        for rule, row in found[name].items():
            print(
                f"{name:8} {rule:26} {row['wait_p50_s']:7.1f} s {row['wait_p95_s']:7.1f} s {row['late_share']:6.1%} "
                f"{row['gpu_hours']:7.1f} {row['busy_share']:6.1%} {row['actions']:8}"
            )
        if arguments.plot and slots == SLOTS[0]:
            plot(arguments.plot, name, load, slots, outcomes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter loads")
    parser.add_argument("--seed", type=int, default=7, help="of the loads and the fleet (7)")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a picture of each load as SVG")
    arguments = parser.parse_args()
    found = {f"slots_{slots}": compare(slots, arguments) for slots in SLOTS}
    print(json.dumps({"bench": "autoscale", "seed": arguments.seed, "target_wait_s": TARGET_WAIT, **found}))


if __name__ == "__main__":
    main()
