"""What clients ask for: a mix of jobs, each drawn from the seed and its number alone."""

import random
from enum import StrEnum
from functools import cache
from typing import Final

import msgspec

from img2img.client import RequestFields
from img2img.requests import JobOptions
from tests.calls import picture
from tests.chaos.fleet import ACCOUNTS


class Errand(StrEnum):
    FAST = "fast"
    SLOW = "slow"
    PICTURE = "picture"
    FAILS_ONCE = "fails_once"
    REFUSED = "refused"
    DEADLINE = "deadline"
    CANCEL = "cancel"
    """Canceled at some moment; may be done before."""
    CANCEL_ENDLESS = "cancel_endless"
    """Canceled at some moment; cannot be done before."""
    WAITS = "waits"
    """A synchronous call: the job is its caller's alone, and ends when nobody waits for it."""


WEIGHTS: Final = {
    Errand.FAST: 6,
    Errand.SLOW: 8,
    Errand.PICTURE: 4,
    Errand.FAILS_ONCE: 2,
    Errand.REFUSED: 1,
    Errand.DEADLINE: 1,
    Errand.CANCEL: 2,
    Errand.CANCEL_ENDLESS: 2,
    Errand.WAITS: 4,
}
CANCELED: Final = frozenset({Errand.CANCEL, Errand.CANCEL_ENDLESS})
NEVER_SUCCEEDS: Final = frozenset({Errand.REFUSED, Errand.DEADLINE, Errand.CANCEL_ENDLESS})


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """``steps`` of ``step_seconds`` each; pauses in seconds, None where the client does no such thing."""

    number: int
    errand: Errand
    account: str
    steps: int
    step_seconds: float
    priority: int
    over_grpc: bool
    watch_over_grpc: bool | None
    cancel_after: float | None
    resubmit_after: float | None
    resubmit_over_grpc: bool
    previews: bool

    @property
    def key(self) -> str:
        return f"order-{self.number}"

    @property
    def prompt(self) -> str:
        words = {Errand.FAILS_ONCE: " fake:fail=1", Errand.REFUSED: " fake:refuse"}.get(self.errand, "")
        return f"order {self.number}: a dog fake:step={self.step_seconds:g}{words}"

    def fields(self) -> RequestFields:
        """The request as the Python client takes it; equal for each try."""
        deadline = 1.0 if self.errand is Errand.DEADLINE else None
        fields = RequestFields(
            prompt=self.prompt,
            num_steps=self.steps,
            seed=self.number,
            options=JobOptions(priority=self.priority, deadline_seconds=deadline, previews=self.previews),
            idempotency_key=self.key,
        )
        if self.errand is Errand.PICTURE:
            fields["image"], fields["strength"] = _picture(), 0.8
        return fields


def draw(seed: int, number: int) -> Order:
    """The order with this number."""
    dice = random.Random(f"order {seed} {number}")
    errand = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    steps, step_seconds = dice.randint(4, 10), round(dice.uniform(0.05, 0.4), 2)
    if errand in (Errand.FAST, Errand.FAILS_ONCE):
        step_seconds = 0.0
    elif errand in (Errand.DEADLINE, Errand.CANCEL_ENDLESS):
        steps, step_seconds = 20, 60.0
    return Order(
        number=number,
        errand=errand,
        account=dice.choice(ACCOUNTS),
        steps=steps,
        step_seconds=step_seconds,
        priority=dice.choice((0, 0, 0, 1, -1)),
        over_grpc=dice.random() < 0.5,
        watch_over_grpc=dice.choice((None, None, False, True)),
        cancel_after=round(dice.uniform(0, 2), 2) if errand in CANCELED else None,
        resubmit_after=round(dice.uniform(0, 4), 2) if dice.random() < 0.2 else None,
        resubmit_over_grpc=dice.random() < 0.5,
        previews=dice.random() < 0.3,
    )


@cache
def _picture() -> bytes:
    return picture(64, 48)
