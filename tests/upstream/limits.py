"""How many calls came in, in windows that slide: exact counts, and the highest that there was."""

import math
from collections import defaultdict, deque

import msgspec


class Seen(msgspec.Struct):
    """What one window counted: ``now`` and ``peak`` are calls within any ``seconds``, ``refused`` those too many."""

    limit: int
    seconds: float
    now: int = 0
    peak: int = 0
    calls: int = 0
    refused: int = 0


class Window:
    """Calls by key (an account, a token) within the last ``seconds``; refused ones count, too."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit, self.seconds = limit, seconds
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)
        self._seen: dict[str, Seen] = {}

    def count(self, key: str, now: float) -> float:
        """Count a call at ``now`` (seconds); how long until there is room again, 0 if it is within the limit."""
        times = self._times[key]
        while times and times[0] <= now - self.seconds:
            times.popleft()
        times.append(now)
        seen = self._seen.setdefault(key, Seen(self.limit, self.seconds))
        seen.now, seen.calls, seen.peak = len(times), seen.calls + 1, max(seen.peak, len(times))
        if len(times) <= self.limit:
            return 0.0
        seen.refused += 1
        return times[-self.limit] + self.seconds - now

    def header(self, key: str, now: float) -> str:
        """The ``Ratelimit`` header: calls left, and seconds until there will be one more."""
        left = max(0, self.limit - len(self._times[key]))
        return f'"default";r={left};t={math.ceil(self._times[key][0] + self.seconds - now)}'

    def seen(self) -> dict[str, Seen]:
        return self._seen
