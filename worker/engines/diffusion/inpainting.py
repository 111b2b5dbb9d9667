"""Regenerating a part of a picture.

A UNet of 4 input channels knows no mask: after every step the part to keep is put back at the noise level
that the step left. One of 9 channels was trained to continue a masked picture that it gets beside the
latents. Both ways the kept part has been through the VAE, which blurs it, so at the end the original's own
pixels go over it.
"""

from dataclasses import dataclass

import torch
from PIL import Image

from worker.engines.diffusion.model import VAE_FACTOR, DiffusionModel
from worker.engines.diffusion.pixels import mask_to_picture
from worker.engines.diffusion.samplers import Step


@dataclass(frozen=True)
class Blend:
    """What keeps the unmasked latents in place, all (1, 4 or 1, h, w): ``mask`` is 1 where to regenerate."""

    original: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor

    def apply(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Put the original back into what ``step`` left: noised for the next step, clean after the last."""
        kept = step.kept * self.original + step.kept_noise * self.noise
        return (1 - self.mask) * kept + self.mask * latents


def shrink_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask (1, 1, H, W) at the latents' size (1, 1, H/8, W/8), nearest pixel as diffusers does."""
    height, width = mask.shape[-2:]
    return torch.nn.functional.interpolate(mask, size=(height // VAE_FACTOR, width // VAE_FACTOR))


def extra_channels(
    model: DiffusionModel, pixels: torch.Tensor, mask: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """What a 9-channel UNet gets beside its latents: mask, then the masked picture's latents (1, 5, h, w)."""
    masked = model.encode_picture(pixels * (mask < 0.5), generator)
    return torch.cat([shrink_mask(mask).to(masked.device), masked], dim=1)


def paste(result: Image.Image, original: Image.Image, mask: torch.Tensor) -> Image.Image:
    """``result`` inside the mask (1, 1, H, W) and the original's own pixels outside it."""
    return Image.composite(result, original, mask_to_picture(mask))
