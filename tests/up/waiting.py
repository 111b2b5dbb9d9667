"""Waiting for a condition, never for a time, and looking at processes."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path


async def eventually(condition: Callable[[], bool], within: float = 20.0, what: str = "") -> None:
    """Return as soon as ``condition`` holds; fail after ``within`` seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:.0f} s: {what or condition}"
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended; one that only waits for init to collect it has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
