"""A day ends at 00:00 UTC, and with it what was used up of it. A test that is about one day keeps within it."""

import time
from typing import Final

DAY: Final = 24 * 3600.0
PATIENCE: Final = 40.0
"""Seconds that a job may wait in a worker for a day's end, and some for the test: closer to it, it would just wait."""


def keep_within_a_day(seconds: float) -> None:
    """Let a day end first that has fewer seconds left: what follows is on one day then, and well before its end."""
    while (left := DAY - time.time() % DAY) < seconds:
        time.sleep(left)
