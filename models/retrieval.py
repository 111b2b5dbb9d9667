"""A number for how well a checkpoint draws: is the drawing that is most like its picture the one that was asked for?

Compared are 32x32 pixels on white, so that checkpoints with different autoencoders can be compared, too; the least
distance over small shifts and the mirrored drawing counts, because trainings move and mirror what they show.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from PIL import Image

from models.drawings import SIDE, Drawings, as_tensor, on_background

THUMB: Final = 32
SHIFT: Final = 2
"""Pixels of a thumb that a picture may be moved by, each way."""


class Gallery:
    """All drawings in one style, to look pictures up in."""

    def __init__(self, drawings: Drawings, style: str) -> None:
        self.names = [label.name for label in drawings.labels if label.style == style]
        rows = [row for row, label in enumerate(drawings.labels) if label.style == style]
        thumbs = _thumbs(on_background(as_tensor(drawings.pictures[rows])))
        self._ways = [thumbs.flatten(1), thumbs.flip(-1).flatten(1)]

    def rank(self, picture: Image.Image, name: str) -> int:
        """How many drawings are as like the picture as that of ``name``, itself included: 1 is best."""
        pixels = torch.from_numpy(np.array(picture.convert("RGB").resize((SIDE, SIDE)))).permute(2, 0, 1)
        shifted = _shifts(_thumbs(pixels[None] / 127.5 - 1)).flatten(1)
        distances = torch.cat([torch.cdist(shifted, way) for way in self._ways]).amin(0)
        return int((distances <= distances[self.names.index(name)]).sum())


def share_within(ranks: Sequence[int], limit: int) -> float:
    """The share of the pictures whose rank is ``limit`` or better."""
    return sum(rank <= limit for rank in ranks) / len(ranks)


def _thumbs(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, 256, 256) to (N, 3, 32, 32) by means."""
    return F.avg_pool2d(pixels, SIDE // THUMB)


def _shifts(thumb: torch.Tensor) -> torch.Tensor:
    """A thumb (1, 3, 32, 32) moved each way, with white coming in: (25, 3, 32, 32)."""
    padded = F.pad(thumb, (SHIFT,) * 4, value=1.0)
    places = range(2 * SHIFT + 1)
    return torch.cat([padded[..., y : y + THUMB, x : x + THUMB] for y in places for x in places])
