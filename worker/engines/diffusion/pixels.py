"""Pillow pictures to tensors and back, by diffusers' own processor so that rounding agrees with it."""

from typing import Final

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

PICTURES: Final = VaeImageProcessor()
MASKS: Final = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at ``size`` (width, height); of that size already, its very pixels."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def picture_to_pixels(picture: Image.Image) -> torch.Tensor:
    """An RGB picture to float32 (1, 3, H, W) in -1..1."""
    pixels: torch.Tensor = PICTURES.preprocess(picture)
    return pixels


def mask_to_pixels(mask: Image.Image) -> torch.Tensor:
    """An L mask to float32 (1, 1, H, W): 1 (regenerate) from 128 up, else 0."""
    pixels: torch.Tensor = MASKS.preprocess(mask)
    return pixels


def pixels_to_picture(pixels: torch.Tensor) -> Image.Image:
    """Float32 (1, 3, H, W), clamped to -1..1, to an RGB picture."""
    picture: Image.Image = PICTURES.postprocess(pixels, output_type="pil")[0]
    return picture


def mask_to_picture(mask: torch.Tensor) -> Image.Image:
    """A mask tensor (1, 1, H, W) of 0 and 1 to an L picture of 0 and 255."""
    return Image.fromarray((mask[0, 0] * 255).to(torch.uint8).numpy(), "L")
