"""A picture as a JSON array of integers to bytes: our decoder against ``json.loads`` and msgspec as a whole.

For each layout of the array: the time until the bytes are there, and the longest stretch for which nothing
else on the event loop had its turn. Medians of several rounds, all peers in every round. A stretch is counted
in CPU time of the loop's thread, so that other processes on a shared machine do not count as ours.

    python bench/ingest.py [--quick]
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypedDict, cast

import msgspec
import uvloop

# Before this folder, whose gateway.py would hide the package of that name.
sys.path.insert(0, str(Path(__file__).parents[1]))

from gateway.rest.bodies import decode_json

MIB: Final = 1024 * 1024
LAYOUTS: Final[dict[str, Callable[[object], str]]] = {
    "compact": lambda body: json.dumps(body, separators=(",", ":")),
    "spaced": json.dumps,
    "pretty": lambda body: json.dumps(body, indent=2),
}


class Body(msgspec.Struct):
    image: list[int]


class Fields(TypedDict):
    image: bytes


async def ours(body: bytes) -> bytes:
    return cast("Fields", await decode_json(body))["image"]


async def standard_library(body: bytes) -> bytes:
    return bytes(json.loads(body)["image"])


async def msgspec_whole(body: bytes) -> bytes:
    return bytes(msgspec.json.decode(body, type=Body).image)


DECODERS: Final[dict[str, Callable[[bytes], Awaitable[bytes]]]] = {
    "ours": ours,
    "json": standard_library,
    "msgspec": msgspec_whole,
}


class Figures:
    """Milliseconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.stalls: list[float] = []

    def medians(self) -> tuple[float, float]:
        return statistics.median(self.seconds) * 1000, statistics.median(self.stalls) * 1000


async def longest_stall(work: Awaitable[bytes]) -> tuple[bytes, float]:
    """The result of ``work``, and the longest that it kept a task waiting which only takes its turns."""
    longest, done = 0.0, False

    async def take_turns() -> None:
        nonlocal longest
        last = time.thread_time()
        while not done:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now

    turns = asyncio.create_task(take_turns(), name="turns")
    await asyncio.sleep(0)
    result = await work
    done = True
    await turns
    return result, longest


async def measure(picture: bytes, body: bytes, rounds: int) -> dict[str, Figures]:
    figures = {name: Figures() for name in DECODERS}
    for _ in range(rounds):
        for name, decode in DECODERS.items():
            started = time.perf_counter()
            decoded = await decode(body)
            figures[name].seconds.append(time.perf_counter() - started)
            assert decoded == picture
            _, stall = await longest_stall(decode(body))
            figures[name].stalls.append(stall)
    return figures


def measure_layouts(rounds: int) -> dict[str, float]:
    """Print a table of all layouts and decoders, and return its figures."""
    picture = os.urandom(MIB)
    summary: dict[str, float] = {}
    print(f"{'layout':9}{'body MiB':>9}  {'decoder':8}{'ms':>8}{'stall ms':>10}{'ours is faster':>16}")
    for layout, encode in LAYOUTS.items():
        body = encode({"prompt": "a lion", "image": list(picture), "num_steps": 20}).encode()
        medians = {name: figures.medians() for name, figures in uvloop.run(measure(picture, body, rounds)).items()}
        for name, (took, stall) in medians.items():
            ratio = took / medians["ours"][0]
            print(f"{layout:9}{len(body) / MIB:9.2f}  {name:8}{took:8.1f}{stall:10.2f}{ratio:15.2f}x")
        summary[f"{layout}_ms"] = round(medians["ours"][0], 2)
        summary[f"{layout}_stall_ms"] = round(medians["ours"][1], 2)
        for peer in ("json", "msgspec"):
            summary[f"{layout}_vs_{peer}"] = round(medians[peer][0] / medians["ours"][0], 2)
            summary[f"{layout}_stall_vs_{peer}"] = round(medians[peer][1] / medians["ours"][1], 1)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 7 if parser.parse_args().quick else 21
    print(json.dumps({"bench": "ingest", "image_bytes": MIB, "rounds": rounds, **measure_layouts(rounds)}))


if __name__ == "__main__":
    main()
