"""How times look on a terminal."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from img2img.client import EtaInfo


def clock(at: datetime) -> str:
    """Date and time on this machine."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def likely(eta: "EtaInfo", now: datetime | None = None) -> str:
    """When a job will be done: ``in about 40 s, 90 % by 18:00:05``."""
    now = now or datetime.now(UTC)
    by = eta.p90.astimezone()
    day = "" if by.date() == now.astimezone().date() else f"{by:%Y-%m-%d} "
    return f"in about {rounded(max(0.0, (eta.p50 - now).total_seconds()))}, 90 % by {day}{by:%H:%M:%S}"


def rounded(seconds: float) -> str:
    """A time in the unit that suits it: ``40 s``, ``17 min``, ``5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.0f} h"
