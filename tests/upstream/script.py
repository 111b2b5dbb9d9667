"""Which behaviour answers a call: queued ones first, then the account's, then what the prompt says."""

import re
from collections import Counter, deque
from typing import Any, Final

from tests.upstream.behaviours import BEHAVIOURS

# upstream:NAME, upstream:NAME:NUMBER, and =TIMES behind either.
ORDER: Final = re.compile(r"([\w-]+?)(?::(\d+(?:\.\d+)?))?(?:=(\d+))?")
WORD: Final = re.compile(r"upstream:(\S+)")

Order = tuple[str, float | None, int | None]


def parse(text: str) -> Order:
    """Name, number and how many times (None: always) of ``3040``, ``slow:0.2`` or ``reset=2``.

    Raises:
        ValueError: no such behaviour.
    """
    match = ORDER.fullmatch(text)
    if match is None or match[1] not in BEHAVIOURS:
        raise ValueError(f"no behaviour {text!r}: use {', '.join(BEHAVIOURS)}, with :NUMBER and =TIMES behind it")
    return match[1], None if match[2] is None else float(match[2]), None if match[3] is None else int(match[3])


class Script:
    """Decides, call by call, and counts the calls with the same prompt and seed."""

    def __init__(self) -> None:
        self._next: deque[Order] = deque()
        self._accounts: dict[str, Order] = {}
        self._calls: Counter[tuple[str, Any]] = Counter()

    def queue(self, *orders: str) -> None:
        """Answer the next calls so, whoever makes them; ``reset=2`` stands for two of them."""
        for order in orders:
            name, number, times = parse(order)
            self._next.extend([(name, number, None)] * (times or 1))

    def set_account(self, account: str, order: str | None) -> None:
        """Answer all calls of this account so, or as usual again."""
        self._accounts.pop(account, None)
        if order is not None:
            self._accounts[account] = parse(order)

    def choose(self, account: str, fields: dict[str, Any]) -> Order:
        """The behaviour for a call with these valid fields.

        Raises:
            ValueError: the prompt names a behaviour that does not exist.
        """
        calls = (fields["prompt"], fields.get("seed"))
        self._calls[calls] += 1
        if self._next:
            return self._next.popleft()
        if account in self._accounts:
            return self._accounts[account]
        call = self._calls[calls]
        for name, number, times in map(parse, WORD.findall(fields["prompt"])):
            if times is None or call <= times:
                return name, number, times
            call -= times
        return "ok", None, None
