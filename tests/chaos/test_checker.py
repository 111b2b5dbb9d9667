"""The checks of the fault test can fail: each broken promise is found in a log that breaks it."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from img2img.jobs import JobEvent, JobState, Outcome, Result
from tests.chaos.checker import check_job, check_records, check_watched
from tests.chaos.intensity import Profile
from tests.chaos.load import Cancel, Record
from tests.chaos.orders import Errand, Order, draw
from tests.chaos.store import Snapshot, Stored

PROFILE = Profile(seed=1, seconds=1)
JOB = "0-00000000-0000-7000-8000-000000000000"
LOST = {"error": {"code": "worker_lost", "message": ""}}


def outcome(**changes: Any) -> Outcome:
    result = Result(blob=f"result:{JOB}.2", media_type="image/png", width=8, height=8, bytes=1, sha256="", expires_at=1)
    whole = Outcome(state=JobState.SUCCEEDED, result=result, executed_by="fake/fake on two")
    return msgspec.structs.replace(whole, **changes)


def stored(end: Outcome | None = None, **fields: str) -> Stored:
    """A job whose first worker died and whose second one made the picture."""
    end = end or outcome()
    data: list[tuple[str, dict[str, Any]]] = [
        ("queued", {}),
        ("running", {"attempt": 1, "worker": "one"}),
        ("queued", LOST),
        ("running", {"attempt": 2, "worker": "two"}),
        ("progress", {}),
        (end.state.value, msgspec.to_builtins(end)),
    ]
    events = [JobEvent(seq=seq, type=kind, at=seq * 1000, data=entry) for seq, (kind, entry) in enumerate(data, 1)]
    raw = msgspec.json.encode(end).decode()
    spec = msgspec.json.encode({"parameters": {"prompt": draw(1, 1).prompt}}).decode()
    record = {
        "spec": spec,
        "state": end.state.value,
        "attempt": "2",
        "fence": "2",
        "crashes": "1",
        "history": "[{}]",
        "outcome": raw,
    }
    arq = msgspec.json.encode({"s": end.state == JobState.SUCCEEDED, "r": raw})
    return Stored(JOB, record | fields, events, arq)


def order(errand: Errand) -> Order:
    return msgspec.structs.replace(draw(1, 1), errand=errand)


def broken(job: Stored, errand: Errand = Errand.SLOW, cancel: Cancel | None = None) -> list[str]:
    record = Record(order(errand), job_ids=[JOB], cancel=cancel)
    return [violation.what for violation in check_job(job, record, PROFILE)]


def without(index: int) -> Callable[[Stored], Stored]:
    """The job without one of its events, the others numbered as if there were no gap."""

    def change(job: Stored) -> Stored:
        rest = [event for number, event in enumerate(job.events) if number != index]
        job.events = [msgspec.structs.replace(event, seq=seq) for seq, event in enumerate(rest, 1)]
        return job

    return change


def with_gap(job: Stored) -> Stored:
    del job.events[4]
    return job


def ended_twice(job: Stored) -> Stored:
    job.events.append(msgspec.structs.replace(job.events[-1], seq=7))
    return job


def test_a_sound_log_breaks_no_rule() -> None:
    assert broken(stored()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_gap, "gaps"),
        (ended_twice, "succeeded after succeeded"),
        (without(5), "has not ended"),
        (without(2), "running after running"),
        (without(1), "queued after queued"),
    ],
)
def test_a_broken_log_is_found(change: Callable[[Stored], Stored], words: str) -> None:
    assert any(words in what for what in broken(change(stored()))), broken(change(stored()))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (stored(fence="3"), "not of its last claim"),
        (stored(outcome(executed_by="fake/fake on one")), "last claimed by two"),
        (stored(state="failed"), "its log succeeded"),
        (stored(attempt="3"), "3 on record"),
        (stored(outcome=msgspec.json.encode(outcome(warnings=("other",))).decode()), "its last event"),
        (stored(crashes="0", history="[]"), "notes"),
        (stored(crashes="0", failures="1"), "notes"),
        (stored(crashes="2"), "notes"),
    ],
)
def test_a_record_that_disagrees_is_found(job: Stored, words: str) -> None:
    assert any(words in what for what in broken(job)), broken(job)


def test_what_outlives_its_attempt_is_found() -> None:
    left = stored(checkpoint="{}", resumed="1")
    picture = {"step": 1, "steps": 9, "media_type": "image/webp", "width": 8, "height": 8, "image": "AA=="}
    left.events[4] = msgspec.structs.replace(left.events[4], type="preview", data=picture)
    assert broken(left) == [
        "its record still has checkpoint, resumed",
        "its log still has the pictures of its previews [5]",
    ]


@pytest.mark.parametrize("errand", [Errand.REFUSED, Errand.DEADLINE, Errand.CANCEL_ENDLESS])
def test_a_success_that_cannot_be_is_found(errand: Errand) -> None:
    assert broken(stored(), errand) == [f"succeeded though {errand}"]


def test_what_a_cancel_promised_is_held_against_the_log() -> None:
    """The second start came four seconds in: after a cancel acknowledged in the third, it must not."""
    assert broken(stored(), Errand.CANCEL, Cancel(4.5, 4.6, "running")) == []
    assert broken(stored(), Errand.CANCEL, Cancel(3, 3.1, "running")) == [
        "started again after its cancel was acknowledged"
    ]
    assert "the answer to the cancel said canceled" in broken(stored(), Errand.CANCEL, Cancel(5, 5.1, "canceled"))


def test_lost_and_doubled_jobs_are_found() -> None:
    snapshot = Snapshot({JOB: stored()}, 2, set(), set(), [])
    lost = Record(order(Errand.SLOW), job_ids=[JOB, "0-gone"])
    found = [violation.what for violation in check_records([lost], snapshot)]
    assert any("one key, several jobs" in what for what in found)
    assert any("lost" in what for what in found)
    assert [violation.what for violation in check_records([], snapshot)] == [
        "made for nobody: no client was ever told of this job"
    ]


@pytest.mark.parametrize(
    "seen",
    [
        [(1, "queued"), (3, "queued")],
        [(1, "queued"), (2, "running"), (2, "running")],
        [(1, "queued"), (2, "progress")],
    ],
)
def test_a_watcher_that_missed_or_doubled_something_is_found(seen: list[tuple[int, str]]) -> None:
    record = Record(order(Errand.SLOW), job_ids=[JOB], seen=seen)
    assert [violation.job_id for violation in check_watched(record, stored())] == [JOB]
