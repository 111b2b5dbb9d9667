"""What must hold when all is over: what went in came out, once, and for a reason.

The rules are those of docs/job-states.md, after Jepsen's total-queue checker.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final

import msgspec

from img2img.jobs import JobState, Outcome
from tests.chaos.intensity import Profile
from tests.chaos.load import Cancel, Record
from tests.chaos.orders import CANCELED, NEVER_SUCCEEDS, Errand
from tests.chaos.store import MEANWHILE, Snapshot, Stored

AFTER: Final = {
    "queued": {"running", "canceled", "expired"},
    "running": {*MEANWHILE, "queued", "succeeded", "failed", "canceled", "expired"},
}
"""What may follow what in a log."""
OF_ATTEMPTS: Final = {"checkpoint", "checkpoint_fence", "resumed", "preview"}
"""Fields of a record that must be gone when its job has ended."""
KINDS: Final = {
    "worker_lost": "crashes",
    "quarantined": "crashes",
    "interrupted": "interruptions",
    "canceled": "ends",
    "expired": "ends",
}
"""What a loss counts as, by its code; any other is a failure."""
HISTORY: Final = 20
"""Lost attempts that a record remembers."""


class Violation(msgspec.Struct, frozen=True):
    """A broken rule, and the job that it concerns."""

    what: str
    job_id: str | None = None


def check_records(records: list[Record], snapshot: Snapshot) -> Iterator[Violation]:
    """What clients were told, against what is stored."""
    owners: dict[str, Record] = {}
    for record in records:
        for problem in record.problems:
            yield Violation(f"{record.order.key}: {problem}", record.job_ids[0] if record.job_ids else None)
        if len(set(record.job_ids)) > 1:
            yield Violation(f"{record.order.key}: one key, several jobs: {set(record.job_ids)}", record.job_ids[0])
        for job_id in set(record.job_ids):
            if job_id not in snapshot.jobs:
                yield Violation(f"{record.order.key}: lost: accepted, but there is no such job", job_id)
            if job_id in owners:
                yield Violation(f"{record.order.key}: shares its job with {owners[job_id].order.key}", job_id)
            owners[job_id] = record
    waiting = {record.order.prompt: record for record in records if record.order.errand is Errand.WAITS}
    for job_id, stored in snapshot.jobs.items():
        if stored.prompt in waiting:
            yield from _check_waiting(waiting[stored.prompt], stored)
        elif job_id not in owners:
            yield Violation("made for nobody: no client was ever told of this job", job_id)


def _check_waiting(record: Record, stored: Stored) -> Iterator[Violation]:
    """A synchronous call's picture is its job's; with a key, what other jobs it had ended because nobody waited."""
    result = None if stored.outcome is None else stored.outcome.result
    if stored.id in record.job_ids:
        if result is None or result.sha256 != record.picture:
            yield Violation("its caller was given another picture", stored.id)
    elif result is not None and record.order.over_grpc:
        yield Violation("a second picture for one key", stored.id)
    if stored.state is JobState.CANCELED and stored.fields.get("stop") != "disconnect":
        yield Violation(f"canceled for {stored.fields.get('stop')} though its caller went away", stored.id)


def check_watched(record: Record, stored: Stored) -> Iterator[Violation]:
    """A watcher sees the log as it is stored: nothing missing, doubled or out of order, the end at the end."""
    log = [(event.seq, event.type) for event in stored.events]
    if record.seen != log[: len(record.seen)]:
        yield Violation(f"a watcher saw {record.seen}", stored.id)
    elif record.watched and len(record.seen) < len(log):
        yield Violation(f"a watcher was told of the end after {len(record.seen)} of {len(log)} events", stored.id)


def check_job(stored: Stored, record: Record | None, profile: Profile) -> Iterator[Violation]:
    """Every rule for one job."""
    broken = list(_log_breaks(stored))
    if not broken:
        broken += _outcome_breaks(stored)
        broken += _budget_breaks(stored, profile)
        broken += _left_behind(stored)
        if record is not None:
            broken += _errand_breaks(stored, record)
            if record.cancel is not None:
                broken += _cancel_breaks(stored, record.order.errand, record.cancel)
    for what in broken:
        yield Violation(what, stored.id)


def _log_breaks(stored: Stored) -> Iterator[str]:
    """The log counts 1, 2, 3 …, follows the state diagram, has one end, and agrees with the record."""
    types = [event.type for event in stored.events]
    if [event.seq for event in stored.events] != list(range(1, len(types) + 1)):
        yield "its log has gaps"
        return
    if not types or types[0] != "queued":
        yield "its log does not begin with queued"
        return
    state = "queued"
    for kind in types[1:]:
        if kind not in AFTER.get(state, set()):
            yield f"its log has {kind} after {state}"
        state = state if kind in MEANWHILE else kind
    if not JobState(state).is_terminal:
        yield f"has not ended: its log ends {state}"
    if stored.state != state:
        yield f"its record says {stored.state}, its log {state}"
    attempts = [event.data.get("attempt") for event in stored.starts]
    if attempts != list(range(1, len(attempts) + 1)) or stored.fields["attempt"] != str(len(attempts)):
        yield f"its attempts are numbered {attempts}, and {stored.fields['attempt']} on record"


def _outcome_breaks(stored: Stored) -> Iterator[str]:
    """Outcome, last event and arq's result are one; a picture is that of the last claim."""
    outcome = stored.outcome
    if outcome is None:
        yield "has ended without an outcome"
        return
    if msgspec.convert(stored.events[-1].data, Outcome) != outcome:
        yield "its outcome is not what its last event says"
    arq = msgspec.json.decode(stored.arq_result or b"null")
    if not arq or arq["s"] != (stored.state == JobState.SUCCEEDED) or arq["r"] != stored.fields["outcome"]:
        yield f"arq's result disagrees: {arq}"
    if (outcome.result is not None) != (stored.state == JobState.SUCCEEDED):
        yield f"{stored.state} with result {outcome.result}"
    if outcome.result is None:
        return
    fence, worker = stored.fields.get("fence"), stored.starts[-1].data["worker"]
    if outcome.result.blob != f"result:{stored.id}.{fence}":
        yield f"its picture {outcome.result.blob} is not of its last claim, fence {fence}"
    if not (outcome.executed_by or "").endswith(f" on {worker}"):
        yield f"executed by {outcome.executed_by}, but last claimed by {worker}"


def _budget_breaks(stored: Stored, profile: Profile) -> Iterator[str]:
    """Failures and crashes end a job at their own limits and not before; an interruption costs nothing."""
    counted = Counter(KINDS.get(code, "failures") for code in stored.losses())
    noted = Counter({kind: int(stored.fields.get(kind, 0)) for kind in ("failures", "crashes", "interruptions")})
    counted.pop("ends", None)
    ended = stored.outcome.error.code if stored.outcome and stored.outcome.error else None
    # A cancel or a deadline that comes first ends the job in the place of its last loss, which is noted all the same.
    hidden = (noted - counted).total() if KINDS.get(ended or "") == "ends" else 0
    if counted - noted or (noted - counted).total() > hidden or hidden > 1:
        yield f"its record notes {dict(noted)}, its log {dict(counted)}"
    if not noted.total() <= len(stored.starts) <= noted.total() + 1:
        yield f"{len(stored.starts)} starts, but {noted.total()} of them came to nothing"
    if len(stored.history) != min(noted.total(), HISTORY):
        yield f"its history has {len(stored.history)} entries for {noted.total()} lost attempts"
    if ended == "engine_failed" and noted["failures"] != profile.attempts:
        yield f"failed after {noted['failures']} of {profile.attempts} attempts"
    if (ended == "quarantined") != (noted["crashes"] >= profile.crash_limit) and hidden == 0:
        yield f"ended {ended} after {noted['crashes']} crashes"


def _left_behind(stored: Stored) -> Iterator[str]:
    """Nothing of an attempt outlives it: neither where it could go on nor what it showed."""
    if left := OF_ATTEMPTS & stored.fields.keys():
        yield f"its record still has {', '.join(sorted(left))}"
    if pictures := [event.seq for event in stored.events if event.preview is not None]:
        yield f"its log still has the pictures of its previews {pictures}"


def _errand_breaks(stored: Stored, record: Record) -> Iterator[str]:
    """It ended as its client could want it to."""
    errand, cancel = record.order.errand, record.cancel
    code = stored.outcome.error.code if stored.outcome and stored.outcome.error else None
    allowed = {None, "quarantined"}
    match errand:
        case Errand.REFUSED:
            allowed.add("model_refused")
        case Errand.FAILS_ONCE:
            allowed.add("engine_failed")
        case Errand.DEADLINE:
            allowed.add("expired")
        case Errand.WAITS:
            allowed.add("canceled")
        case _ if errand in CANCELED and cancel is not None:
            allowed.add("canceled")
    if code not in allowed:
        yield f"ended {stored.state} ({code}) though {errand}"
    if errand in NEVER_SUCCEEDS and stored.state == JobState.SUCCEEDED:
        yield f"succeeded though {errand}"


def _cancel_breaks(stored: Stored, errand: Errand, cancel: Cancel) -> Iterator[str]:
    """What was canceled does not start again, and ends canceled unless it ended by itself first."""
    told = cancel.told * 1000
    if JobState(cancel.state).is_terminal and cancel.state != stored.state:
        yield f"the answer to the cancel said {cancel.state}"
    if any(start.at > told + 1 for start in stored.starts):
        yield "started again after its cancel was acknowledged"
    endless = errand is Errand.CANCEL_ENDLESS
    if endless and stored.state != JobState.CANCELED and stored.events[-1].at > told + 1:
        yield f"ended {stored.state} after its cancel was acknowledged"


def check_store(snapshot: Snapshot) -> Iterator[Violation]:
    """Nothing is left that belongs to a living job, and no fence was given twice."""
    for leftover in snapshot.leftovers:
        yield Violation(leftover)
    guilty = {stored.id for stored in snapshot.jobs.values() if stored.fields.get("quarantined")}
    if snapshot.quarantine != guilty:
        yield Violation(f"the quarantine holds {snapshot.quarantine}, but those in it should be {guilty}")
    fences = [int(stored.fields["fence"]) for stored in snapshot.jobs.values() if "fence" in stored.fields]
    if len(set(fences)) < len(fences) or max(fences, default=0) > snapshot.fence:
        yield Violation("two jobs ran under one fence, or one under a fence that was never given")
