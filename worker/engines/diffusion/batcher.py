"""Which jobs take the next step together: policy alone, without a tensor or a clock of its own.

Jobs of one size share a pass through the network, the most pressed first, up to as many rows as the size allows.
Sizes take turns by *deficit round-robin* (Shreedhar, Varghese 1996) in measured seconds, so that a small size is not
held up by a large one for longer than one of the large one's steps; whoever would miss its deadline by waiting goes
before them all. Jobs that must be reproducible run in the first rows of passes of a fixed number of rows, which others
of their size may fill up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

Size = tuple[int, int]
"""Width and height in pixels."""

GUIDED_ROWS: Final = 2
BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows that a device gets which is prepared for each (a CUDA graph, a compiled kernel)."""
MEMORY: Final = 0.1
"""The weight of the latest measurement of a pass in its running mean."""


@dataclass(eq=False)
class Entry:
    """A job in the batcher: ``rows`` of each pass of its size, ``left`` steps to go, ``deadline`` in seconds."""

    size: Size
    rows: int
    left: int
    deadline: float = math.inf
    reproducible: bool = False


class Limits(NamedTuple):
    """``max_rows`` of a pass at ``native_pixels``, fewer for larger pictures; ``fixed_rows`` of reproducible passes.

    With ``padded`` passes are filled up to the next of ``BUCKETS``. At the size ``any_place`` a row's bits do not
    depend on its place in a reproducible pass, so that jobs may share one; else each has the first rows of its own.
    """

    max_rows: int
    native_pixels: int
    fixed_rows: int = 4
    padded: bool = False
    any_place: Size | None = None


class Pass(NamedTuple):
    """One pass through the network: who takes part, and how many rows it must have (None: as many as they have)."""

    size: Size
    entries: tuple[Entry, ...]
    rows: int | None

    @property
    def filled(self) -> int:
        """The rows of those who take part."""
        return sum(entry.rows for entry in self.entries)


class Turn(NamedTuple):
    """What takes turns: a size, with reproducible jobs apart."""

    size: Size
    reproducible: bool


@dataclass
class _Queue:
    """The entries of one turn in the order of their deadlines, and the seconds that it may use."""

    entries: list[Entry] = field(default_factory=list)
    deficit: float = 0.0


class Batcher:
    """Keeps the jobs that want steps, and says which of them take the next one."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._caps: dict[Size, int] = {}
        self._queues: dict[Turn, _Queue] = {}
        self._seconds: dict[Size, float] = {}
        """Of a pass, by size: a running mean."""

    def __len__(self) -> int:
        return sum(len(queue.entries) for queue in self._queues.values())

    def add(self, entry: Entry) -> None:
        """A job wants its next step; between two jobs of one deadline the earlier one goes first."""
        queue = self._queues.setdefault(Turn(entry.size, entry.reproducible), _Queue())
        queue.entries.append(entry)
        queue.entries.sort(key=lambda one: one.deadline)

    def remove(self, entry: Entry) -> None:
        """It wants no more."""
        turn = Turn(entry.size, entry.reproducible)
        self._queues[turn].entries.remove(entry)
        if not self._queues[turn].entries:
            del self._queues[turn]

    def pick(self, now: float) -> Pass | None:
        """Who takes the next step; None when nobody wants one."""
        if not self._queues:
            return None
        turn = self._pressed(now) or self._next_turn()
        return self._reproducible(turn) if turn.reproducible else self._usual(turn)

    def took(self, done: Pass, seconds: float) -> None:
        """A pass was made in that time; each of its entries has one step less to go."""
        mean = self._seconds.get(done.size, seconds)
        self._seconds[done.size] = mean + MEMORY * (seconds - mean)
        for entry in done.entries:
            entry.left -= 1
        turn = Turn(done.size, done.entries[0].reproducible)
        if turn in self._queues:
            self._queues[turn].deficit -= seconds

    def cap(self, size: Size) -> int:
        """How many rows a pass of that size may have."""
        if size not in self._caps:
            share = self._limits.native_pixels / (size[0] * size[1])
            rows = math.floor(self._limits.max_rows * min(share, 1.0))
            self._caps[size] = max(rows, self._limits.fixed_rows, GUIDED_ROWS)
        return self._caps[size]

    def shrink(self, failed: Pass) -> bool:
        """Memory did not suffice: allow half of its rows from now on; False when their number cannot be less."""
        if failed.entries[0].reproducible or len(failed.entries) == 1:
            return False
        self._caps[failed.size] = failed.filled // 2
        return True

    def _pressed(self, now: float) -> Turn | None:
        """The turn of the job that would miss its deadline if every other size went first, if there is one."""
        if len(self._queues) == 1:
            return None
        round_ = sum(self._expected(turn) for turn in self._queues)
        slack: dict[Turn, float] = {}
        for turn, queue in self._queues.items():
            first = queue.entries[0]
            slack[turn] = first.deadline - now - first.left * self._expected(turn)
        turn = min(slack, key=lambda one: slack[one])
        return turn if 0 <= slack[turn] < round_ else None

    def _next_turn(self) -> Turn:
        """Deficit round-robin; each visit gives as much time as the longest pass takes, so that one suffices."""
        quantum = max(self._expected(turn) for turn in self._queues)
        while True:
            turn, queue = next(iter(self._queues.items()))
            if queue.deficit > 0:
                return turn
            # No more is owed than one round, however long a pass took that compiled something.
            queue.deficit = max(queue.deficit, -quantum) + quantum
            # To the end of the round.
            self._queues[turn] = self._queues.pop(turn)
            if len(self._queues) == 1:
                queue.deficit = quantum
                return turn

    def _expected(self, turn: Turn) -> float:
        """The seconds of a pass; of a size not seen yet as of the nearest, by pixels."""
        if turn.size in self._seconds:
            return self._seconds[turn.size]
        if not self._seconds:
            return 1e-3
        pixels = turn.size[0] * turn.size[1]
        nearest = min(self._seconds, key=lambda size: abs(math.log(size[0] * size[1] / pixels)))
        return self._seconds[nearest] * pixels / (nearest[0] * nearest[1])

    def _usual(self, turn: Turn) -> Pass:
        waiting = self._queues[turn].entries
        # The first takes part, also where memory was too small for so many rows as a guided job has.
        entries = _fitting(waiting, max(self.cap(turn.size), waiting[0].rows))
        rows = sum(entry.rows for entry in entries)
        padded = next((bucket for bucket in BUCKETS if bucket >= rows), rows) if self._limits.padded else None
        return Pass(turn.size, tuple(entries), padded)

    def _reproducible(self, turn: Turn) -> Pass:
        rows, entries = self._limits.fixed_rows, self._queues[turn].entries
        entries = _fitting(entries if turn.size == self._limits.any_place else entries[:1], rows)
        others = self._queues.get(Turn(turn.size, reproducible=False))
        if others is not None:
            entries += _fitting(others.entries, rows - sum(entry.rows for entry in entries))
        return Pass(turn.size, tuple(entries), rows)


def _fitting(entries: Sequence[Entry], rows: int) -> list[Entry]:
    """The first entries that fit into so many rows; a smaller one may go where a larger one does not fit."""
    chosen = []
    for entry in entries:
        if entry.rows <= rows:
            chosen.append(entry)
            rows -= entry.rows
        if rows == 0:
            break
    return chosen
