"""What the scripts in ``lua/`` are told of a job, and what they write and answer, read back. Fields: docs/queue.md."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from img2img.errors import AccountQueueFull, Congested, DeadlineUnreachable, QueueFull, SpendCapReached
from img2img.jobs import (
    Eta,
    Job,
    JobSpec,
    JobState,
    Outcome,
    PastAttempt,
    Running,
    StopReason,
    StoredCheckpoint,
)
from img2img.queue_types import Claim, Discard, Lifetime, Rules, Share
from img2img.requests import Parameters
from img2img.server import milliseconds

JOB_FIELDS: Final = (
    "spec", "account", "state", "created", "expires", "attempt", "started", "finished", "running", "outcome", "stop",
    "failures", "crashes", "interruptions", "replays", "history", "queue",
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


def order_of(spec: JobSpec, lifetime: Lifetime, share: Share, rules: Rules) -> dict[str, object]:
    """What ``submit.lua`` is told of a job, but for its pools and whom it joins or waits for."""
    options, work = spec.options, work_of(spec.parameters)
    return {
        "id": spec.id,
        "account": spec.account,
        "fingerprint": spec.fingerprint,
        "inputs": spec.inputs,
        "lifetime": milliseconds(lifetime.seconds),
        "own_deadline": lifetime.asked_for,
        "keep": milliseconds(lifetime.keep),
        "horizon": milliseconds(max(lifetime.longest, lifetime.seconds) + lifetime.keep),
        "not_before": 0 if options.not_before is None else milliseconds(options.not_before.timestamp()),
        "boost": milliseconds(options.priority * rules.priority_seconds),
        "reject_if_busy": options.reject_if_busy,
        "refuse_late": rules.refuse_late,
        "max_failures": rules.attempts,
        "max_crashes": rules.crash_limit,
        "max_queued_account": share.max_queued,
        "weight": share.weight,
        "size": work.size,
        "pixels": work.pixels,
        "steps": work.steps,
    }


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
        pool=fields["queue"].decode(),
        history=() if history is None else msgspec.json.decode(history, type=tuple[PastAttempt, ...]),
    )


def read_claim(raw: Sequence[Any]) -> Claim:
    """A claim of ``claim.lua``.

    Raises:
        msgspec.MsgspecError: another release wrote the job.
    """
    job_id, fence, attempt, spec, created, expires, now, suspect, failures, checkpoint, elsewhere = raw
    return Claim(
        id=job_id.decode(),
        fence=fence,
        attempt=attempt,
        spec=msgspec.json.decode(spec, type=JobSpec),
        created_at=int(created),
        expires_at=int(expires),
        claimed_at=now,
        suspect=bool(suspect),
        failures=int(failures),
        checkpoint=None if checkpoint is None else msgspec.json.decode(checkpoint, type=StoredCheckpoint),
        may_go_elsewhere=bool(elsewhere),
    )


def read_stop(answer: bytes) -> StopReason:
    """Why a job should stop, where a script does not answer "ok"."""
    return StopReason.LEASE_LOST if answer == b"lost" else StopReason(answer.decode())


def read_discard(word: str) -> Discard:
    """A word of ``sweep.lua``: for how many milliseconds which blob is kept."""
    kept, _, key = word.partition(" ")
    return Discard(word, key, int(kept) / 1000)


def read_refusal(why: str, pause: float, eta: float | None) -> Congested:
    """Why ``submit.lua`` takes no job now; ``pause`` and ``eta`` are in seconds."""
    likely = "" if eta is None else f"; a job queued now would be done in about {eta:.0f} s"
    if why == "late":
        return DeadlineUnreachable(
            f"The deadline cannot be met{likely}: try again later, or allow more time", pause, eta
        )
    if why == "spend":
        return SpendCapReached(
            "What may be spent today on this account's jobs is spent: try again after 00:00 UTC, or ask for more",
            pause,
        )
    if why == "full_account":
        return AccountQueueFull(f"As many jobs of this account wait as may{likely}: try again later", pause, eta)
    return QueueFull(f"As many jobs wait as may{likely}: try again later", pause, eta)
