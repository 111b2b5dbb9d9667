"""Random weights in Stable Diffusion 1.5's shape, float16, as a diffusers folder: speed does not depend on values.

python -m bench.engine_weights FOLDER
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from worker.engines.diffusion.loading import SD15


def make_weights(folder: Path) -> None:
    """Save them; the folder is there once all of it is."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15 / "unet"))
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SD15 / "vae"))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(SD15 / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(SD15 / "tokenizer", local_files_only=True),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(SD15 / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unfinished = folder.with_suffix(".part")
    pipeline.to(torch.float16).save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    make_weights(Path(sys.argv[1]))
