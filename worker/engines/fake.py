"""An engine without a model: deterministic pictures at any speed, for tests and load.

Words in the prompt make it misbehave:

    fake:fail       fail every attempt (EngineFailed)
    fake:fail=N     fail the first N attempts at this prompt and seed, then work
    fake:refuse     refuse the task (ModelRefused)
    fake:unsafe     draw what the safety checker ``fake`` flags
    fake:step=0.2   take that many seconds a step
    fake:block=3    hold up the event loop for that many seconds, as only a broken engine does
    fake:hang       do nothing more and let nobody end it, as a thread that hangs in native code
    fake:crash      kill the process

With ``obeys=False`` it does none of this but ``fake:step``: as a build in which the fault is mended.
"""

import asyncio
import hashlib
import math
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Final, Self

import msgspec
from PIL import Image as PillowImage

from img2img.errors import EngineFailed, ModelRefused
from img2img.jobs import Receipt, Stage
from img2img.requests import Sampler
from worker.engines.base import Checkpoint, EngineInfo, Image, Output, Pictures, Preview, Progress, Task, steps_of
from worker.engines.receipts import package_versions, pixels_digest

INFO: Final = EngineInfo("fake", "fake", "cpu", (256, 256))
REVISION: Final = "fake-1"
DEFAULT_SAMPLER: Final = Sampler.DPMPP_2M
DIRECTIVE: Final = re.compile(r"fake:(fail|refuse|unsafe|step|block|hang|crash)(?:=(\d+(?:\.\d+)?))?")
HARMLESS: Final = "step"
UNSAFE: Final = "fake:unsafe"
"""Marks a picture, in Pillow's ``info``, for ``worker.safety.FakeSafetyChecker``."""
PATTERN_SIDE: Final = 8
STAMP_PIXELS: Final = 11
PREVIEW_SIDE: Final = 64
GREY: Final = (128, 128, 128)


class State(msgspec.Struct, frozen=True):
    """What a checkpoint holds: the steps done, and a digest of the task and its pictures."""

    step: int
    task: str


class FakeEngine:
    """Draws a pattern that every field of the task but ``previews`` and ``deadline``, and every input pixel, changes.

    ``step_seconds`` is the time a step takes; a ``fake:step=`` in the prompt wins over it. ``checkpoint_seconds`` is
    the least time between two checkpoints of a task; with 0 there is one at an interrupt only.
    """

    def __init__(self, step_seconds: float = 0.0, *, obeys: bool = True, checkpoint_seconds: float = 5.0) -> None:
        self._step_seconds = step_seconds
        self._obeys = obeys
        self._checkpoint_seconds = checkpoint_seconds or math.inf
        self._failures: Counter[tuple[str, int]] = Counter()

    @property
    def info(self) -> EngineInfo:
        return INFO

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""

    def slots(self, setting: int) -> int:
        """As many as are asked for, else one."""
        return setting or 1

    async def slots_changed(self, told: int) -> None:
        """They never do."""
        await asyncio.Event().wait()

    async def broken(self) -> None:
        """It never is."""
        await asyncio.Event().wait()

    async def generate(
        self,
        task: Task,
        pictures: Pictures,
        resume: Checkpoint | None = None,
        interrupt: asyncio.Event | None = None,
    ) -> AsyncGenerator[Output]:
        """Yield what a diffusion engine yields for ``task``; see ``Engine.generate``."""
        directives = self._directives(task.prompt)
        if "refuse" in directives:
            raise ModelRefused("The fake engine was told to refuse: take 'fake:refuse' out of the prompt")
        yield Progress(Stage.ENCODE_TEXT)
        if pictures.image is not None:
            yield Progress(Stage.ENCODE_IMAGE)
        steps = steps_of(task, pictures)
        done = 0 if resume is None else await asyncio.to_thread(_steps_done, resume, task, pictures)
        async with aclosing(self._take_steps(task, pictures, done, steps, interrupt)) as outputs:
            async for output in outputs:
                yield output
        if interrupt is not None and interrupt.is_set():
            return
        yield Progress(Stage.DECODE_IMAGE)
        image = await asyncio.to_thread(_finish, task, pictures, steps)
        if "unsafe" in directives:
            image.picture.info[UNSAFE] = True
        yield image

    async def _take_steps(
        self, task: Task, pictures: Pictures, done: int, steps: int, interrupt: asyncio.Event | None
    ) -> AsyncGenerator[Output]:
        """The steps after ``done``, with what comes between them."""
        directives = self._directives(task.prompt)
        seconds, saved = float(directives.get("step") or self._step_seconds), time.monotonic()
        yield Progress(Stage.STEPS, done, steps)
        for step in range(done + 1, steps + 1):
            await asyncio.sleep(seconds)
            if step == done + 1:
                await self._misbehave(directives, task)
            yield Progress(Stage.STEPS, step, steps)
            if task.previews:
                yield Preview(step, steps, sketch(task, step / steps))
            ends = interrupt is not None and interrupt.is_set()
            if ends or time.monotonic() - saved >= self._checkpoint_seconds:
                saved = time.monotonic()
                state = State(step, await asyncio.to_thread(_identity, task, pictures))
                yield Checkpoint(step, steps, msgspec.json.encode(state))
            if ends:
                return

    def _directives(self, prompt: str) -> dict[str, str | None]:
        found = {match[1]: match[2] for match in DIRECTIVE.finditer(prompt)}
        return {name: value for name, value in found.items() if self._obeys or name == HARMLESS}

    async def _misbehave(self, directives: dict[str, str | None], task: Task) -> None:
        if "crash" in directives:
            os.kill(os.getpid(), signal.SIGKILL)
        while "hang" in directives:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        if "block" in directives:
            threading.Event().wait(float(directives["block"] or 1))
        if "fail" not in directives:
            return
        attempt = (task.prompt, task.seed)
        limit = directives["fail"]
        if limit is None or self._failures[attempt] < float(limit):
            self._failures[attempt] += 1
            raise EngineFailed("The fake engine was told to fail: take 'fake:fail' out of the prompt")


def _finish(task: Task, pictures: Pictures, steps: int) -> Image:
    picture = draw(task, pictures)
    receipt = Receipt(
        pixels_sha256=pixels_digest(picture),
        model=INFO.model,
        revision=REVISION,
        weights={},
        sampler=(task.sampler or DEFAULT_SAMPLER).value,
        steps=steps,
        precision="none",
        device=INFO.device,
        versions=package_versions("img2img", "pillow"),
        rows=1 if task.reproducible else None,
    )
    return Image(picture, receipt)


def draw(task: Task, pictures: Pictures) -> PillowImage.Image:
    """A coloured pattern of the task's size, mixed with the input picture by ``strength``.

    The mean distance to the input grows in proportion to ``strength``, and pixels outside the mask are the
    input's.
    """
    # These say how to work, not what to draw.
    task = msgspec.structs.replace(task, reproducible=False, previews=False, deadline=math.inf)
    size = (task.width, task.height)
    pixels = _digest(pictures)
    # In blocks, not blurred: encoding a smooth pattern costs more than all else that the service does for a job.
    pattern = _pattern(msgspec.structs.replace(task, strength=0.0), pixels).resize(size, PillowImage.Resampling.NEAREST)
    if pictures.image is None:
        return _stamp(pattern, task, pixels)
    picture = pictures.image.resize(size)
    changed = _stamp(PillowImage.blend(picture, pattern, task.strength), task, pixels)
    if pictures.mask is None:
        return changed
    mask = pictures.mask.resize(size, PillowImage.Resampling.NEAREST)
    return PillowImage.composite(changed, picture, mask.point([0] * 128 + [255] * 128))


def sketch(task: Task, share: float) -> PillowImage.Image:
    """What a preview shows when that ``share`` of the steps is done: the task's pattern, small, coming out of grey."""
    scale = PREVIEW_SIDE / max(task.width, task.height)
    size = (max(1, int(task.width * scale)), max(1, int(task.height * scale)))
    pattern = _pattern(task, b"").resize(size, PillowImage.Resampling.NEAREST)
    return PillowImage.blend(PillowImage.new("RGB", size, GREY), pattern, share)


def _identity(task: Task, pictures: Pictures) -> str:
    """A digest of all that decides what the picture looks like, in hexadecimal."""
    return _bytes(task, _digest(pictures), 16).hex()


def _steps_done(checkpoint: Checkpoint, task: Task, pictures: Pictures) -> int:
    """How many steps need not be taken again: none if the checkpoint is unreadable, or another task's."""
    try:
        state = msgspec.json.decode(checkpoint.data, type=State)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0
    return state.step if state.task == _identity(task, pictures) else 0


def _pattern(task: Task, pixels: bytes) -> PillowImage.Image:
    colours = _bytes(task, pixels, 3 * PATTERN_SIDE**2)
    return PillowImage.frombytes("RGB", (PATTERN_SIDE, PATTERN_SIDE), colours)


def _stamp(picture: PillowImage.Image, task: Task, pixels: bytes) -> PillowImage.Image:
    """Write a digest of everything into the first pixels: a change too small to see still shows."""
    digest = _bytes(task, pixels, 3 * STAMP_PIXELS)
    picture.paste(PillowImage.frombytes("RGB", (STAMP_PIXELS, 1), digest), (0, 0))
    return picture


def _bytes(task: Task, pixels: bytes, count: int) -> bytes:
    """``count`` bytes that look random and depend on ``pixels`` and every field of the task that is the picture's."""
    asked = msgspec.structs.replace(task, previews=False, deadline=math.inf)
    return hashlib.shake_128(msgspec.json.encode(asked) + pixels).digest(count)


def _digest(pictures: Pictures) -> bytes:
    """SHA-256 of the size and pixels of each input picture."""
    digest = hashlib.sha256()
    for picture in (pictures.image, pictures.mask):
        digest.update(repr(picture and picture.size).encode())
        if picture is not None:
            digest.update(picture.tobytes())
    return digest.digest()
