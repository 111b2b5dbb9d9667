"""A job's record on the server, read back. The scripts in ``lua/`` write it; fields: docs/queue.md."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from img2img.jobs import Eta, Job, JobSpec, JobState, Outcome, PastAttempt, Running, StopReason
from img2img.requests import Parameters

JOB_FIELDS: Final = (
    "spec", "account", "state", "created", "expires", "attempt", "started", "finished", "running", "outcome", "stop",
    "failures", "crashes", "interruptions", "replays", "history",
)  # fmt: skip
SIZE_GRID: Final = 64
"""Sizes are measured as if rounded up to multiples of this many pixels."""


class Work(msgspec.Struct, frozen=True):
    """What decides how long a job runs: a name for its size, its pixels (0: the model's own size), its steps."""

    size: str
    pixels: int
    steps: int


def work_of(parameters: Parameters) -> Work:
    """The work that a request asks for."""
    width, height = parameters.width, parameters.height
    if width is None or height is None:
        return Work("native", 0, parameters.steps)
    across, down = (-(-side // SIZE_GRID) * SIZE_GRID for side in (width, height))
    return Work(f"{across}x{down}", width * height, parameters.steps)


def read_job(row: Sequence[Any]) -> Job:
    """The job of a row of ``look.lua``: ``JOB_FIELDS``, then position, p50 and p90."""
    *values, position, p50, p90 = row
    fields = dict(zip(JOB_FIELDS, values, strict=True))

    def number(name: str) -> int | None:
        return None if fields[name] is None else int(fields[name])

    running, outcome, stop, history = (fields[name] for name in ("running", "outcome", "stop", "history"))
    return Job(
        spec=msgspec.json.decode(fields["spec"], type=JobSpec),
        state=JobState(fields["state"].decode()),
        created_at=int(fields["created"]),
        expires_at=int(fields["expires"]),
        attempt=int(fields["attempt"]),
        started_at=number("started"),
        finished_at=number("finished"),
        running=None if running is None else msgspec.json.decode(running, type=Running),
        outcome=None if outcome is None else msgspec.json.decode(outcome, type=Outcome),
        stop_requested=None if stop is None else StopReason(stop.decode()),
        queue_position=position,
        eta=None if p50 is None else Eta(int(p50), int(p90)),
        failures=number("failures") or 0,
        crashes=number("crashes") or 0,
        interruptions=number("interruptions") or 0,
        replays=number("replays") or 0,
        history=() if history is None else msgspec.json.decode(history, type=tuple[PastAttempt, ...]),
    )
