"""What a failed run tells: the schedule, and of each job concerned its log beside the faults around it."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from tests.chaos.checker import Violation
from tests.chaos.faults import Done, Fault
from tests.chaos.intensity import Profile
from tests.chaos.restarts import Crash
from tests.chaos.store import Stored

JOBS_SHOWN: Final = 10
AROUND: Final = 2.0
"""Seconds before a job's first and after its last event in which faults are shown, too."""


def describe(
    profile: Profile,
    faults: Sequence[Fault],
    done: Sequence[Done],
    jobs: dict[str, Stored],
    crashes: Sequence[Crash],
    violations: Sequence[Violation],
) -> str:
    """A text for a person."""
    concerned = list(dict.fromkeys(violation.job_id for violation in violations if violation.job_id))
    lines = [f"{len(violations)} violations, profile {profile}", "", "schedule:"]
    lines += [
        f"  {fault.at:7.2f} {fault.kind:14} pick {fault.pick:.3f} for {fault.seconds:g} s{' cut' if fault.cut else ''}"
        for fault in faults
    ]
    lines += ["", "what happened:"]
    lines += [f"  {_clock(fault.started)} to {_clock(fault.ended)} {fault.kind} of {fault.target}" for fault in done]
    lines += ["", "jobs whose worker lived, but whose lease ran out while the server was disturbed:"]
    lines += [f"  {crash.job_id} event {crash.seq}: {crash.worker}" for crash in crashes if crash.cause == "server"]
    for job_id in concerned[:JOBS_SHOWN]:
        lines += ["", *_job_lines(job_id, jobs.get(job_id), done)]
    lines += ["", *(f"{violation.job_id or '-'}: {violation.what}" for violation in violations)]
    return "\n".join(lines)


def _job_lines(job_id: str, stored: Stored | None, done: Sequence[Done]) -> Iterator[str]:
    yield f"job {job_id}"
    if stored is None or not stored.events:
        yield "  has no log"
        return
    moments = [
        (event.at / 1000, f"{event.seq:4} {event.type} {msgspec.json.encode(event.data).decode()}")
        for event in stored.events
    ]
    first, last = moments[0][0] - AROUND, moments[-1][0] + AROUND
    for fault in done:
        moments += [
            (at, f"     {words}: {fault.kind} of {fault.target}")
            for at, words in ((fault.started, "FAULT"), (fault.ended, "FAULT OVER"))
            if first <= at <= last
        ]
    for at, words in sorted(moments):
        yield f"  {_clock(at)} {words}"
    shown = ("spec", "outcome")
    yield f"  record: { {name: value for name, value in stored.fields.items() if name not in shown} }"
    yield f"  prompt: {stored.prompt}"


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S.%f}"
