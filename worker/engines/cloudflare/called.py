"""How one call went: what its answer says, the picture in it, and what is on record of it."""

import asyncio
from typing import Final

import msgspec
from PIL import Image as PillowImage

from img2img.jobs import Receipt, UpstreamCall
from img2img.schema import MODEL
from worker.engines.base import Image, Pictures, Task, steps_of
from worker.engines.cloudflare.accounts import Account
from worker.engines.cloudflare.exchange import Answer
from worker.engines.cloudflare.hints import hold_seconds, neurons, retry_after
from worker.engines.cloudflare.outcomes import Action, Outcome, Verdict, classify
from worker.engines.cloudflare.pictures import NoPicture, read_picture
from worker.engines.receipts import pixels_digest

DEVICE: Final = "Cloudflare Workers AI"
DENIED_SECONDS: Final = 60.0
"""How long a credential is left alone that was not let in: other accounts and other pools do its jobs meanwhile."""


class Called(msgspec.Struct, frozen=True):
    """How one call went, and what came with it.

    The upstream asked for a ``pause`` before the next call of any kind, and takes none with that credential while it is
    ``held`` (seconds).
    """

    verdict: Verdict
    request_id: str = ""
    neurons: float | None = None
    pause: float = 0.0
    held: float = 0.0
    picture: PillowImage.Image | None = None

    @property
    def was_billed(self) -> bool:
        """Whether it cost something though it brought no picture: because it says so, or was good but for that."""
        return bool(self.neurons) or self.verdict.outcome.action is Action.FAIL

    @property
    def told(self) -> str:
        """What the upstream said, to stand inside a sentence, and the name under which it knows the call."""
        words = self.verdict.words.rstrip(".")
        return f" ({words}; request {self.request_id})" if self.request_id else f" ({words})"


async def read_answer(answer: Answer, size: tuple[int, int]) -> Called:
    """What ``answer`` brought; a picture counts if it has this (width, height)."""
    verdict, picture = classify(answer), None
    if verdict.outcome is Outcome.PICTURE:
        try:
            picture = await asyncio.to_thread(read_picture, answer, size)
        except NoPicture as exc:
            verdict = Verdict(Outcome.NO_PICTURE, str(exc))
    asked = retry_after(answer.headers)
    held = hold_seconds(answer.headers)
    if verdict.outcome is Outcome.RATE:
        held = max(held, asked)
    elif verdict.outcome is Outcome.DENIED and "json" in answer.headers.get("content-type", ""):
        # In HTML it is the word of a firewall before the API about what is in the call: others may pass.
        held = max(held, DENIED_SECONDS)
    return Called(verdict, answer.request_id, neurons(answer.headers), asked, held, picture)


def finish(called: Called, picture: PillowImage.Image, account: Account, task: Task, pictures: Pictures) -> Image:
    """The job's picture, with what is known of how it was made. Plain CPU work: call it in a thread."""
    receipt = Receipt(
        pixels_sha256=pixels_digest(picture),
        model=MODEL,
        revision="",
        weights={},
        sampler="",
        steps=steps_of(task, pictures),
        precision="",
        device=DEVICE,
        versions={},
    )
    call = UpstreamCall(request_id=called.request_id, account=account.label, neurons=called.neurons)
    return Image(picture, receipt, call)
