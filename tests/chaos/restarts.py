"""What the logs tell together with the faults: how soon a killed worker's jobs ran again, and who was thought dead."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import msgspec

from img2img.jobs import JobEvent
from tests.chaos.checker import KINDS
from tests.chaos.faults import Done, Kind
from tests.chaos.fleet import Fleet
from tests.chaos.store import MEANWHILE, Stored

LIMIT: Final = 10.0
HURTS_WORKER: Final = (Kind.WORKER_KILL, Kind.WORKER_STALL, Kind.WORKER_TERM, Kind.BLACK_HOLE)
HURTS_SERVER: Final = (Kind.SERVER_KILL, Kind.SERVER_STALL)
SLACK: Final = 1.0


class Restart(msgspec.Struct, frozen=True):
    """Seconds from a worker's SIGKILL to its job's next start."""

    job_id: str
    worker: str
    seconds: float
    calm: bool
    """The server was undisturbed all that time."""
    fair: bool
    """And a slot was idle from when the job was given back."""


class Span(msgspec.Struct, frozen=True):
    """Something that lasted, in seconds since 1970."""

    start: float
    end: float

    def meets(self, start: float, end: float) -> bool:
        return self.start < end and start < self.end


class Occupancy:
    """Which slots were taken when, by the logs and by the processes' lives."""

    def __init__(self, fleet: Fleet, faults: Sequence[Done], jobs: Sequence[Stored]) -> None:
        self._slots = fleet.profile.slots
        self._taken: dict[str, list[Span]] = {}
        for stored in jobs:
            for start, end in attempts(stored):
                worker = str(start.data["worker"])
                self._taken.setdefault(worker, []).append(Span(start.at / 1000, end))
        lives = [life for member in fleet.workers for life in member.lives if life.ready]
        self._lives = {life.name: Span(life.ready, life.ended or math.inf) for life in lives}
        self._hurt: dict[str, list[Span]] = {}
        for fault in faults:
            if fault.kind in HURTS_WORKER:
                self._hurt.setdefault(fault.target, []).append(Span(fault.started, fault.ended))

    def always_idle(self, start: float, end: float) -> bool:
        """Whether at any moment from ``start`` to before ``end`` some healthy worker had a free slot."""
        moments = {start}
        for spans in (*self._taken.values(), *self._hurt.values(), self._lives.values()):
            moments |= {edge for span in spans for edge in (span.start, span.end)}
        return all(self._idle(moment) for moment in moments if start <= moment < end)

    def _idle(self, moment: float) -> bool:
        return any(
            life.start <= moment < life.end
            and not any(hurt.start <= moment < hurt.end for hurt in self._hurt.get(name, ()))
            and sum(taken.start <= moment < taken.end for taken in self._taken.get(name, ())) < self._slots
            for name, life in self._lives.items()
        )


def attempts(stored: Stored) -> Iterator[tuple[JobEvent, float]]:
    """Each start, and when (seconds since 1970) that attempt was over by the log."""
    start: JobEvent | None = None
    for event in stored.events:
        if event.type == "running":
            start = event
        elif event.type not in MEANWHILE and start is not None:
            yield start, event.at / 1000
            start = None


def measure_restarts(fleet: Fleet, faults: Sequence[Done], jobs: Sequence[Stored]) -> list[Restart]:
    """One for each job that ran on a worker when it was killed, and that was queued again for it."""
    occupancy = Occupancy(fleet, faults, jobs)
    server = [Span(fault.started, fault.ended) for fault in faults if fault.kind in HURTS_SERVER]
    kills = {fault.target: fault.started for fault in faults if fault.kind is Kind.WORKER_KILL}
    found = []
    for stored in jobs:
        events = [event for event in stored.events if event.type not in MEANWHILE]
        for number, event in enumerate(events[:-2]):
            killed = kills.get(str(event.data.get("worker")), math.inf)
            lost, again = events[number + 1], events[number + 2]
            if event.type != "running" or lost.type != "queued" or lost.at / 1000 < killed:
                continue
            if again.type != "running":
                continue  # canceled or expired while it waited
            end = min(again.at / 1000, killed + LIMIT)
            calm = not any(span.meets(killed - SLACK, end) for span in server)
            fair = calm and occupancy.always_idle(lost.at / 1000, end)
            found.append(Restart(stored.id, str(event.data["worker"]), again.at / 1000 - killed, calm, fair))
    return found


class Crash(msgspec.Struct, frozen=True):
    """A worker that was thought dead: ``cause`` is what had been done to it, or to the server, or None."""

    job_id: str
    seq: int
    worker: str
    cause: str | None


def find_crashes(fleet: Fleet, faults: Sequence[Done], jobs: Sequence[Stored]) -> Iterator[Crash]:
    """Every time that a job lost its worker."""
    reach = fleet.profile.lease + SLACK
    for stored in jobs:
        events = [event for event in stored.events if event.type not in MEANWHILE]
        for start, lost in pairwise(events):
            error = lost.data.get("error")
            if start.type != "running" or not isinstance(error, dict) or KINDS.get(error["code"]) != "crashes":
                continue
            worker, at = str(start.data["worker"]), lost.at / 1000
            before = [fault for fault in faults if fault.started <= at]
            near = [fault for fault in before if Span(fault.started, fault.ended + SLACK).meets(at - reach, at)]
            # A death can be noticed late, when the server was away meanwhile.
            died = any(fault.kind is Kind.WORKER_KILL and fault.target == worker for fault in before)
            own = died or any(fault.target == worker for fault in near)
            others = any(fault.kind in HURTS_SERVER for fault in near)
            yield Crash(stored.id, lost.seq, worker, "worker" if own else "server" if others else None)
