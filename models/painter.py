"""Pictures from a checkpoint, by diffusers' own pipelines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from models.networks import FACTOR, pick_device

BATCH: Final = 8
DOG: Final = Path(__file__).parents[1] / "examples" / "dog.png"
EXAMPLES: Final = ((0.6, 3.5), (0.75, 3.5), (0.9, 3.5), (0.9, 7.5), (1.0, 7.5))
"""(strength, guidance) of the pictures beside the dog in examples.png."""
EXAMPLE_SIDE: Final = 200


class Manner(NamedTuple):
    """How to draw; ``strength`` matters only with an input picture."""

    steps: int = 20
    guidance: float = 7.5
    strength: float = 1.0
    seed: int = 1


class Painter:
    """A loaded checkpoint in float32; every picture has the noise of its own seed, whatever it is batched with."""

    def __init__(self, folder: Path) -> None:
        device = pick_device()
        from_text: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        from_picture: Any = StableDiffusionImg2ImgPipeline(**from_text.components, requires_safety_checker=False)
        self._from_text = from_text.to(device, torch.float32)
        self._from_picture = from_picture
        for pipeline in (self._from_text, self._from_picture):
            pipeline.set_progress_bar_config(disable=True)
        self.side = FACTOR * int(self._from_text.unet.config.sample_size)

    def paint(self, prompts: Sequence[str], manner: Manner, picture: Image.Image | None = None) -> list[Image.Image]:
        """A picture for each prompt, from ``picture`` or from nothing."""
        painted = []
        for first in range(0, len(prompts), BATCH):
            painted += self._paint(list(prompts[first : first + BATCH]), manner, picture)
        return painted

    def _paint(self, prompts: list[str], manner: Manner, picture: Image.Image | None) -> list[Image.Image]:
        settings: dict[str, Any] = {
            "prompt": prompts,
            "num_inference_steps": manner.steps,
            "guidance_scale": manner.guidance,
            "generator": [torch.Generator().manual_seed(manner.seed) for _ in prompts],
        }
        if picture is None:
            drawn = self._from_text(**settings, width=self.side, height=self.side)
        else:
            images = [picture.resize((self.side, self.side))] * len(prompts)
            drawn = self._from_picture(**settings, image=images, strength=manner.strength)
        images_drawn: list[Image.Image] = drawn.images
        return images_drawn

    def paint_examples(self, name: str, seed: int = 1) -> Image.Image:
        """The model card's strip: the dog, and the dog changed to a ``name`` in several manners."""
        dog = Image.open(DOG).convert("RGB")
        row = [dog]
        for strength, guidance in EXAMPLES:
            row += self.paint([f"Change to a {name}"], Manner(20, guidance, strength, seed), dog)
        strip = Image.new("RGB", (EXAMPLE_SIDE * len(row), EXAMPLE_SIDE), "white")
        for place, image in enumerate(row):
            strip.paste(image.resize((EXAMPLE_SIDE, EXAMPLE_SIDE)), (EXAMPLE_SIDE * place, 0))
        return strip
