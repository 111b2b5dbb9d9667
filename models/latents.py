"""The drawings as latents: each of them several times on white, moved, scaled and mirrored a little."""

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from rich.progress import track

from models.drawings import Drawings, as_tensor

VARIANTS: Final = 8
"""Times that each drawing is laid out; the first is as rendered, every other one is mirrored."""
SMALLEST: Final = 0.85
CHUNK: Final = 64


def encode_drawings(drawings: Drawings, autoencoder: Any, device: torch.device, seed: int) -> torch.Tensor:
    """All drawings as latents (N, VARIANTS, 4, 32, 32), half precision, on the device."""
    generator = torch.Generator().manual_seed(seed)
    autoencoder = autoencoder.to(device).eval()
    latents = []
    with torch.inference_mode():
        for pictures in track(torch.split(as_tensor(drawings.pictures), CHUNK), "Encoding drawings"):
            variants = []
            for variant in range(VARIANTS):
                pixels = lay_out(pictures.to(device), _transforms(len(pictures), variant, generator).to(device))
                variants.append(autoencoder.encode(pixels).latents.half())
            latents.append(torch.stack(variants, 1))
    # Out of inference mode: what is trained on must allow gradients of what is computed with it.
    return torch.cat(latents).clone()


def lay_out(pictures: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """RGBA pictures (N, 4, H, W) on white, (N, 3, H, W) in -1..1, each through a 2x3 matrix of ``transforms``."""
    pixels = pictures.float()
    # Colours are weighed by how opaque they are, or those of what is transparent would show at the edges.
    opaque = torch.cat((pixels[:, :3] * pixels[:, 3:] / 255, pixels[:, 3:]), 1)
    grid = F.affine_grid(transforms, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(opaque, grid, align_corners=False)
    return (moved[:, :3] + 255 - moved[:, 3:]) / 127.5 - 1


def _transforms(count: int, variant: int, generator: torch.Generator) -> torch.Tensor:
    """Matrices (count, 2, 3) from places in the result to places in the drawing, as grid_sample wants them."""
    mirror = -1.0 if variant % 2 else 1.0
    matrices = torch.zeros(count, 2, 3)
    scale = torch.ones(count)
    shift = torch.zeros(count, 2)
    if variant:
        scale = SMALLEST + (1 - SMALLEST) * torch.rand(count, generator=generator)
        # What is left at each side, in units of half the picture.
        shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)[:, None]
    matrices[:, 0, 0] = mirror / scale
    matrices[:, 1, 1] = 1 / scale
    matrices[:, :, 2] = -shift / scale[:, None]
    return matrices
