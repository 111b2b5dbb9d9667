"""What looks at finished pictures before anybody gets them."""

import asyncio
from typing import Protocol

from PIL import Image

from img2img.errors import UnsafeOutput
from worker.engines.fake import UNSAFE


class SafetyChecker(Protocol):
    """Says which pictures nobody may get. A worker opens one, if it is told to, and asks it about each picture."""

    def is_unsafe(self, picture: Image.Image) -> bool:
        """Look at an 8-bit RGB picture. CPU work of up to some seconds: called in threads, in several at once."""
        ...


class FakeSafetyChecker:
    """Flags what the fake engine made of a prompt with ``fake:unsafe``, and nothing else."""

    def is_unsafe(self, picture: Image.Image) -> bool:
        return UNSAFE in picture.info


async def check_picture(checker: SafetyChecker, picture: Image.Image) -> None:
    """Let a harmless picture pass.

    Raises:
        UnsafeOutput: the checker flags it.
    """
    if await asyncio.to_thread(checker.is_unsafe, picture):
        raise UnsafeOutput("The safety checker flagged the picture: change the prompt, the input picture or the seed")
