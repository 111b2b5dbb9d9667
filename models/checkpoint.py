"""A diffusers folder of the trained networks: fp16 safetensors, model card, notices and licences."""

import json
from pathlib import Path
from string import Template
from typing import Any, Final, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from models.drawings import Drawings
from models.networks import millions
from models.sources import STYLES

CARD: Final = Path(__file__).parent / "card.md"
LICENCES: Final = Path(__file__).parents[1] / "worker" / "models" / "emoji-sd" / "licenses"
NOISE: Final = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
"""Stable Diffusion's schedule."""


class Parts(NamedTuple):
    """What a checkpoint consists of; ``vae`` knows its scaling factor."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any


def load_parts(folder: Path) -> Parts:
    """The parts of a diffusers folder, in float32 on the CPU."""
    return Parts(
        AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
    )


def save_checkpoint(parts: Parts, folder: Path, drawings: Drawings, shown: str, history: str) -> None:
    """Write the folder. The parts become half precision.

    ``shown`` is what the card says that examples.png shows, ``history`` its sentence on how they were trained.
    """
    pipeline: Any = StableDiffusionPipeline(
        **parts._asdict(),
        scheduler=DPMSolverMultistepScheduler(**NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    _forget_origins(folder)
    card = Template(CARD.read_text()).substitute(
        name=folder.name,
        text_encoder=millions(parts.text_encoder),
        vocabulary=len(parts.tokenizer),
        window=parts.tokenizer.model_max_length,
        unet=millions(parts.unet),
        vae=millions(parts.vae),
        names=", ".join(drawings.names),
        shown=shown,
        styles=", ".join(STYLES[style].words for style in drawings.styles),
        history=history,
        packages=", ".join(drawings.packages),
        diffusers=diffusers.__version__,
    )
    (folder / "README.md").write_text(card)
    (folder / "NOTICE").write_text(_notice(folder.name))
    licences = folder / "licenses"
    licences.mkdir(exist_ok=True)
    for name in {style.licence_file for style in STYLES.values()}:
        (licences / name).write_bytes((LICENCES / name).read_bytes())


def _forget_origins(folder: Path) -> None:
    """Take out of the configurations where on this machine the networks were loaded from."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")


def _notice(name: str) -> str:
    """What the drawings' licences want said. The autoencoder saw all styles, so all are named."""
    head = f"{name} was trained on rendered emoji drawings. Their licences travel with it, in licenses/.\n"
    paragraphs = [
        f"{style.title}\n"
        f"  Copyright {style.holder}\n"
        f"  {style.home}\n"
        f"  Licensed under the {style.licence} (licenses/{style.licence_file}).\n"
        "  Changes: rendered to 256x256 pixels and used as training data; the model draws approximations.\n"
        for style in STYLES.values()
    ]
    dog = "examples.png begins with Twemoji's dog face, rendered to 256x256 pixels.\n"
    return "\n".join([head, *paragraphs, dog])
