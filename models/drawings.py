"""The rendered drawings: one array of pictures, and what each of them shows in which style."""

import json
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import torch

SIDE: Final = 256
PICTURES: Final = "drawings.npy"
INDEX: Final = "drawings.json"

Pictures = npt.NDArray[np.uint8]


class Drawing(NamedTuple):
    """What a picture shows; ``name`` as in :class:`models.things.Thing`, ``style`` a key of ``STYLES``."""

    name: str
    style: str


class Drawings(NamedTuple):
    """The data set. ``pictures`` is (N, 256, 256, 4) uint8, RGBA, beside ``labels``; ``words`` is all text known of it,
    ``packages`` say what it was rendered from.

    The pictures are a view of a file: what is changed in them stays in memory.
    """

    pictures: Pictures
    labels: list[Drawing]
    words: list[str]
    packages: list[str]

    def choose(self, things: int | None, styles: tuple[str, ...]) -> "Drawings":
        """The first ``things`` (None: all) that are drawn in any of ``styles``, in these styles only.

        Raises:
            click.BadParameter: there is no drawing in one of the styles.
        """
        for style in styles:
            if not any(label.style == style for label in self.labels):
                raise click.BadParameter(f"no drawing is in {style}: take of {', '.join(self.styles)}")
        names = list(dict.fromkeys(label.name for label in self.labels if label.style in styles))[:things]
        kept = set(names)
        rows = [row for row, label in enumerate(self.labels) if label.style in styles and label.name in kept]
        return Drawings(self.pictures[rows], [self.labels[row] for row in rows], self.words, self.packages)

    @property
    def names(self) -> list[str]:
        """The things that are drawn, the best known first."""
        return list(dict.fromkeys(label.name for label in self.labels))

    @property
    def styles(self) -> list[str]:
        """The styles that there are, in order."""
        return list(dict.fromkeys(label.style for label in self.labels))


def open_drawings(folder: Path) -> Drawings:
    """What :mod:`models.prepare` wrote into ``folder``.

    Raises:
        click.ClickException: it is not there.
    """
    if not (folder / INDEX).exists():
        raise click.ClickException(f"{folder} has no drawings: run python -m models.prepare first")
    index = json.loads((folder / INDEX).read_text())
    # Copy on write, because torch takes no read-only memory.
    pictures: Pictures = np.load(folder / PICTURES, mmap_mode="c")
    return Drawings(pictures, [Drawing(*label) for label in index["labels"]], index["words"], index["packages"])


def as_tensor(pictures: Pictures) -> torch.Tensor:
    """Pictures (N, H, W, 4) as the same memory in torch's order, (N, 4, H, W) uint8."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def on_background(pictures: torch.Tensor, background: torch.Tensor | float = 1.0) -> torch.Tensor:
    """RGBA (N, 4, H, W) in 0..255 laid over a colour in -1..1, of shape (N, 3, 1, 1) or one number: (N, 3, H, W)."""
    pixels = pictures.float()
    alpha = pixels[:, 3:] / 255
    return (pixels[:, :3] / 127.5 - 1) * alpha + background * (1 - alpha)
