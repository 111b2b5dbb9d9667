"""How much work a pool owes: the formula."""

from datetime import UTC, datetime

import pytest

from gateway.scaling import (
    Calls,
    busy_workers,
    calls_owed,
    demand_seconds,
    is_active,
    seconds_in,
    signal_of,
)
from img2img.errors import InvalidRequest
from img2img.queue_types import QueueStats, WorkerInfo

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def stats(
    queued: int = 0, running: int = 0, seconds: float = 0.0, left: float = 0.0, slots: tuple[int, ...] = ()
) -> QueueStats:
    workers = tuple(WorkerInfo(f"w{number}", count, "fake", "fake", "cpu") for number, count in enumerate(slots))
    return QueueStats(queued, 0, running, 0, seconds, left, 0.0, workers)


def test_a_dead_upstream_calls_for_no_more_workers() -> None:
    """Those that there are pause, and one of them may have to try."""
    signal = signal_of("burst", stats(1000, 0, 6400.0, slots=(0, 0)), NOW, 60.0, Calls(100.0, 64))
    assert signal.demand_seconds == pytest.approx(60.0 / 64, abs=0.001)
    assert is_active(signal, 0.0)


def test_paused_workers_without_jobs_are_not_kept() -> None:
    """An account may be used up until midnight: a pool without work goes to zero all the same."""
    signal = signal_of("burst", stats(slots=(0,)), NOW, 60.0, Calls(100.0, 64))
    assert signal.demand_seconds == 0.0
    assert not is_active(signal, 0.0)


def test_paused_workers_are_not_busy() -> None:
    assert signal_of("burst", stats(0, 64, slots=(64, *[0] * 10)), NOW, 60.0, Calls(100.0, 64)).busy_workers == 1


class TestGpus:
    def test_work_that_waits_and_what_is_left_of_the_running(self) -> None:
        signal = signal_of("gpu", stats(9, 4, 60.0, 15.0, (4,)), NOW, 30.0, None)
        assert (signal.backlog_seconds, signal.demand_seconds) == (75.0, 75.0)
        assert (signal.busy_workers, signal.workers, signal.slots) == (1, 1, 4)
        assert signal.updated_at == NOW

    def test_busy_workers_are_not_taken_away(self) -> None:
        """However little is left of what they do."""
        signal = signal_of("gpu", stats(0, 8, 0.0, 0.1, (4, 4, 4)), NOW, 30.0, None)
        assert (signal.busy_workers, signal.demand_seconds) == (2, 60.0)

    def test_without_workers_all_that_waits_counts(self) -> None:
        signal = signal_of("gpu", stats(2, 0, 3.0), NOW, 30.0, None)
        assert (signal.busy_workers, signal.demand_seconds) == (0, 3.0)

    @pytest.mark.parametrize(
        ("running", "workers", "slots", "busy"),
        [(0, 3, 12, 0), (1, 3, 12, 1), (4, 3, 12, 1), (5, 3, 12, 2), (12, 3, 12, 3), (2, 2, 3, 2)],
    )
    def test_workers_are_busy_as_far_as_jobs_fill_them(self, running: int, workers: int, slots: int, busy: int) -> None:
        assert busy_workers(running, workers, slots) == busy

    def test_jobs_of_workers_that_leave_call_for_no_others(self) -> None:
        assert busy_workers(6, 1, 1) == 1
        assert busy_workers(6, 2, 0) == 0

    def test_demand_is_the_larger_of_both(self) -> None:
        assert demand_seconds(10.0, 1, 30.0) == 30.0
        assert demand_seconds(100.0, 1, 30.0) == 100.0


class TestCalls:
    CALLS = Calls(per_second=5.0, at_once=64)

    def test_calls_count_and_not_their_seconds(self) -> None:
        """A worker that calls is wanted for every 64 calls that are to be made, whatever its target."""
        for target in (1.0, 30.0):
            signal = signal_of("burst", stats(64, 64, 640.0, 0.0, (66,)), NOW, target, Calls(100.0, 64))
            assert signal.demand_seconds == 2 * target

    def test_the_upstreams_limit_bounds_them(self) -> None:
        """Five calls a second, of four seconds each: twenty under way."""
        assert calls_owed(1000, 10, 4000.0, self.CALLS) == 20.0

    def test_one_call_is_always_owed_where_one_waits(self) -> None:
        assert calls_owed(3, 0, 0.003, self.CALLS) == 1.0

    def test_none_is_owed_where_none_waits(self) -> None:
        assert calls_owed(0, 0, 0.0, self.CALLS) == 0.0
        assert calls_owed(0, 7, 0.0, self.CALLS) == 7.0


class TestActivity:
    @pytest.mark.parametrize(("seconds", "active"), [(0.0, False), (5.0, False), (5.001, True)])
    def test_work_above_the_activation_brings_a_worker(self, seconds: float, active: bool) -> None:
        signal = signal_of("gpu", stats(1, 0, seconds), NOW, 30.0, None)
        assert is_active(signal, 5.0) is active

    def test_what_runs_keeps_the_last_worker(self) -> None:
        signal = signal_of("gpu", stats(0, 1, 0.0, 0.0, (4,)), NOW, 30.0, None)
        assert is_active(signal, 1000.0)


class TestSeconds:
    @pytest.mark.parametrize(("given", "seconds"), [(None, 30.0), ("7.5", 7.5), (8, 8.0)])
    def test_numbers_are_read(self, given: str | float | None, seconds: float) -> None:
        assert seconds_in("targetSeconds", given, 30.0, least=0.001) == seconds

    @pytest.mark.parametrize("given", ["", "soon", "0", "-1", "nan", "inf", "1e300"])
    def test_anything_else_is_refused_with_the_field(self, given: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            seconds_in("targetSeconds", given, 30.0, least=0.001)
        assert caught.value.field == "targetSeconds"
        assert str(caught.value) == "'targetSeconds' must be a number of seconds from 0.001"
