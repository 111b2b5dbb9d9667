"""What an answer's headers say beside the answer. A header that cannot be read says nothing."""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

LONGEST: Final = 24 * 3600.0
RATELIMIT: Final = re.compile(r";\s*r=(\d{1,9})\b.*?;\s*t=(\d{1,9})\b")


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait before the next call, 0 where nothing is said; at most a day."""
    text = headers.get("retry-after", "").strip()
    seconds = _number(text)
    if seconds is None:
        try:
            at = parsedate_to_datetime(text)
        except ValueError:
            return 0.0
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(0.0, seconds), LONGEST)


def hold_seconds(headers: Mapping[str, str]) -> float:
    """Seconds for which the token has no calls left, by ``Ratelimit: "default";r=0;t=30``; else 0."""
    match = RATELIMIT.search(headers.get("ratelimit", ""))
    if match is None or int(match[1]) > 0:
        return 0.0
    return min(float(match[2]), LONGEST)


def neurons(headers: Mapping[str, str]) -> float | None:
    """What the call cost, where that is told."""
    cost = _number(headers.get("cf-ai-neurons", "").strip())
    return cost if cost is not None and cost >= 0 else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
