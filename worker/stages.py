"""Where a job's time goes."""

import time

from img2img import telemetry
from img2img.jobs import Stage


class StageClock:
    """Seconds per stage, without gaps: one stage ends where the next begins. Each is a span, too."""

    def __init__(self, queued: float) -> None:
        self.seconds: dict[Stage, float] = {Stage.QUEUED: max(0.0, queued)}
        self._stage = Stage.LOAD
        self._since = time.perf_counter()
        self._span = telemetry.start_stage(Stage.LOAD)

    def enter(self, stage: Stage) -> None:
        if stage == self._stage:
            return
        self.close()
        self._stage, self._span = stage, telemetry.start_stage(stage)

    def close(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since = now
        self._span.end()

    def observe(self) -> None:
        for stage, seconds in self.seconds.items():
            telemetry.STAGE_SECONDS.labels(stage.value).observe(seconds)
