"""Which behaviour answers a call: what is ordered for anybody, then for its account, then what the prompt says."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from tests.upstream.behaviours import BEHAVIOURS

# upstream:NAME, upstream:NAME:NUMBER, and =TIMES behind either.
ORDER: Final = re.compile(r"([\w-]+?)(?::(\d+(?:\.\d+)?))?(?:=(\d+))?")
WORD: Final = re.compile(r"upstream:(\S+)")

ANYBODY: Final = ""


class Order(msgspec.Struct, frozen=True):
    """A behaviour, the number behind its name, and for how many calls (None: from here on)."""

    name: str
    number: float | None = None
    times: int | None = None


USUAL: Final = Order("ok")


def parse(text: str) -> Order:
    """``3040``, ``slow:0.2`` or ``reset=2``.

    Raises:
        ValueError: no such behaviour.
    """
    match = ORDER.fullmatch(text)
    if match is None or match[1] not in BEHAVIOURS:
        raise ValueError(f"no behaviour {text!r}: use {', '.join(BEHAVIOURS)}, with :NUMBER and =TIMES behind it")
    return Order(match[1], None if match[2] is None else float(match[2]), None if match[3] is None else int(match[3]))


class Script:
    """Decides, call by call."""

    def __init__(self) -> None:
        # Of whoever calls next, and of each account: its orders, and how many calls they have answered.
        self._orders: dict[str, tuple[list[Order], int]] = {}
        self._calls: Counter[tuple[str, Any]] = Counter()

    def order(self, *orders: str, account: str = ANYBODY) -> None:
        """Answer the next calls so, of an account or of anybody, in place of what was ordered before; then as usual."""
        self._orders[account] = ([parse(order) for order in orders], 0)

    def choose(self, account: str, fields: dict[str, Any]) -> Order:
        """The behaviour for a call with these valid fields.

        Raises:
            ValueError: the prompt names a behaviour that does not exist.
        """
        same = (fields["prompt"], fields.get("seed"))
        self._calls[same] += 1
        for key in (ANYBODY, account):
            orders, calls = self._orders.get(key, ([], 0))
            if chosen := nth(orders, calls + 1):
                self._orders[key] = (orders, calls + 1)
                return chosen
        return nth([parse(word) for word in WORD.findall(fields["prompt"])], self._calls[same]) or USUAL


def nth(orders: Iterable[Order], call: int) -> Order | None:
    """The order that the ``call``-th call (from 1) gets, when each order is for as many calls as it says."""
    for order in orders:
        if order.times is None or call <= order.times:
            return order
        call -= order.times
    return None
