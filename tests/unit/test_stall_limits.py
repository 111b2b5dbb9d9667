"""What counts as hung: a limit for each phase, one for each step by its size, and only time in which we ran."""

import pytest

from img2img.jobs import Stage
from worker.engines.base import Progress
from worker.watchdog import Hung, StepLimits, Watchdog

STALL, PHASE = 60.0, 600.0
SMALL, LARGE = (256, 256), (512, 512)


@pytest.fixture
def steps() -> StepLimits:
    return StepLimits(floor=STALL, first=PHASE)


def learn(steps: StepLimits, size: tuple[int, int], *seconds: float) -> None:
    """Do a first step, which counts for nothing, and then these."""
    for each in (100.0, *seconds):
        steps.measured(size, each)


class TestSteps:
    def test_nothing_is_known_at_first(self, steps: StepLimits) -> None:
        assert steps.of(SMALL) == PHASE
        steps.measured(SMALL, 100.0)
        assert steps.of(SMALL) == PHASE

    def test_slow_steps_may_take_ten_times_as_long(self, steps: StepLimits) -> None:
        learn(steps, SMALL, 15.0)
        assert steps.of(SMALL) == 150.0

    def test_quick_steps_have_the_stall_limit(self, steps: StepLimits) -> None:
        learn(steps, SMALL, 0.1, 0.2)
        assert steps.of(SMALL) == STALL

    def test_the_mean_follows_what_is_measured(self, steps: StepLimits) -> None:
        learn(steps, SMALL, 10.0, *[20.0] * 100)
        assert steps.of(SMALL) == pytest.approx(200.0, rel=0.001)

    def test_the_first_step_of_another_size_may_compile(self, steps: StepLimits) -> None:
        learn(steps, SMALL, 10.0)
        assert steps.of(LARGE) == PHASE

    def test_the_first_step_of_a_far_larger_size_may_take_still_longer(self, steps: StepLimits) -> None:
        learn(steps, SMALL, 30.0)
        assert steps.of(LARGE) == 1200.0

    def test_the_second_step_of_another_size_is_expected_by_its_pixels(self, steps: StepLimits) -> None:
        learn(steps, SMALL, 10.0)
        learn(steps, LARGE)
        assert steps.of(LARGE) == 400.0

    def test_the_nearest_size_counts(self, steps: StepLimits) -> None:
        learn(steps, (1024, 1024), 1000.0)
        learn(steps, SMALL, 10.0)
        learn(steps, (256, 512))
        assert steps.of((256, 512)) == 200.0


class TestLooking:
    def test_a_phase_has_its_limit(self) -> None:
        watchdog = Watchdog(STALL, PHASE)
        with watchdog.phase("loading the model"):
            assert watchdog.look(1.0) == []
            assert watchdog.look(PHASE) == []
            assert watchdog.look(1.0) == [Hung("loading the model", "loading the model", PHASE + 1, PHASE)]
        assert watchdog.look(1.0) == []

    def test_every_output_is_a_sign_of_life(self) -> None:
        watchdog = Watchdog(STALL, PHASE)
        with watchdog.job("0-1") as job:
            for stage in (Stage.DECODE, Stage.ENCODE_TEXT, Stage.ENCODE_IMAGE):
                job.progress(Progress(stage), SMALL)
                assert watchdog.look(PHASE) == []
            for step in range(3):
                job.progress(Progress(Stage.STEPS, step, 20), SMALL)
                assert watchdog.look(PHASE) == []
            assert watchdog.look(PHASE) == [Hung("0-1", "steps", PHASE, STALL)]

    def test_a_job_that_goes_on_where_it_was_tells_nothing_of_its_first_word(self) -> None:
        watchdog = Watchdog(STALL, PHASE)
        with watchdog.job("0-1") as job:
            for progress in (Progress(Stage.ENCODE_TEXT), Progress(Stage.STEPS, 7, 20), Progress(Stage.STEPS, 8, 20)):
                job.progress(progress, SMALL)
            # One step was measured: a size's first one, which counts for nothing.
            assert watchdog.look(1.0) == []
            assert watchdog.look(PHASE) == []
            assert watchdog.look(1.0) == [Hung("0-1", "steps", PHASE + 1, PHASE)]

    def test_a_renewed_phase_begins_anew(self) -> None:
        watchdog = Watchdog(STALL, PHASE)
        with watchdog.job("0-1") as job:
            for _ in range(3):
                assert watchdog.look(PHASE) == []
                job.renew()

    def test_each_job_is_watched_for_itself(self) -> None:
        watchdog = Watchdog(STALL, PHASE)
        with watchdog.job("0-1") as lively, watchdog.job("0-2"):
            for _ in range(2):
                lively.enter(Stage.STORE)
                watchdog.look(PHASE)
            lively.enter(Stage.STORE)
            assert [hung.what for hung in watchdog.look(1.0)] == ["0-2"]

    async def test_a_loop_that_does_not_come_round_hangs(self) -> None:
        watchdog = Watchdog(STALL, PHASE)
        watchdog.watch_loop()
        watchdog.look(1.0)
        assert [hung.what for hung in watchdog.look(STALL + 1)] == ["event loop"]
