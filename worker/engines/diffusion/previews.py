"""Small pictures of what a job has so far, without the VAE: latents are nearly linear in the colours they mean."""

from typing import Final

import torch
from PIL import Image as PillowImage

from worker.engines.diffusion.model import VAE_FACTOR, DiffusionModel

SAMPLES: Final = 4
SIDE: Final = 256
PATCHES: Final = 16


class PreviewMap:
    """Latents to RGB, fitted by least squares to what a model's own VAE makes of random pictures.

    Published factors fit Stable Diffusion's VAE only; this fits whichever was loaded. Call it under inference mode, in
    the thread that owns the model.
    """

    def __init__(self, model: DiffusionModel) -> None:
        generator = torch.Generator().manual_seed(0)
        latents, colours = [], []
        for _ in range(SAMPLES):
            pixels = _random_picture(generator)
            latents.append(_columns(model.encode_picture(pixels, generator).cpu()))
            colours.append(_columns(torch.nn.functional.avg_pool2d(pixels, VAE_FACTOR)))
        self._factors = torch.linalg.lstsq(torch.cat(latents), torch.cat(colours)).solution[:, :3]

    def picture(self, latents: torch.Tensor) -> PillowImage.Image:
        """The picture of clean latents (1, 4, h, w), w x h pixels."""
        height, width = latents.shape[-2:]
        colours = _columns(latents.cpu()) @ self._factors
        levels = ((colours + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return PillowImage.fromarray(levels.reshape(height, width, 3).numpy(), "RGB")


def _random_picture(generator: torch.Generator) -> torch.Tensor:
    """Soft patches of random colours (1, 3, 256, 256) in -1..1."""
    patches = 2 * torch.rand(1, 3, PATCHES, PATCHES, generator=generator) - 1
    return torch.nn.functional.interpolate(patches, size=(SIDE, SIDE), mode="bilinear")


def _columns(image: torch.Tensor) -> torch.Tensor:
    """(1, C, h, w) to (h * w, C + 1): one row a pixel, and a constant."""
    rows = image[0].flatten(1).T.float()
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
