"""The shapes of the networks, and the numbers they compute with."""

import platform
from typing import Any, Final

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from models.drawings import SIDE
from worker.engines.diffusion.model import has_bfloat16

FACTOR: Final = 8
"""Pixels of a picture's side for one of the latents'."""
LATENT_CHANNELS: Final = 4
LATENT_SIDE: Final = SIDE // FACTOR

SIZES: Final[dict[str, dict[str, Any]]] = {
    "small": {
        "unet": {"block_out_channels": (64, 128, 192), "layers_per_block": 1, "attention_head_dim": 4},
        "text": {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6},
    },
    "base": {
        "unet": {"block_out_channels": (128, 256, 320), "layers_per_block": 2, "attention_head_dim": 8},
        "text": {"hidden_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8},
    },
}
"""``small`` is what two CPU cores can train, ``base`` wants a GPU. ``attention_head_dim`` is diffusers' old name for
the number of heads."""


def make_autoencoder() -> Any:
    """The f=8 autoencoder, 0.34 million parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1, 1, 1, 2),
        num_decoder_blocks=(2, 1, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )


def make_unet(size: str) -> Any:
    """A UNet of one of ``SIZES`` for latents (N, 4, 32, 32)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=SIZES[size]["text"]["hidden_size"],
        norm_num_groups=16,
        **SIZES[size]["unet"],
    )


def make_text_encoder(size: str, tokenizer: Any) -> Any:
    """A CLIP text encoder of one of ``SIZES`` for the tokenizer's vocabulary and window."""
    shape = SIZES[size]["text"]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=4 * shape["hidden_size"],
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    return CLIPTextModel(config)


def millions(network: Any) -> str:
    """How many parameters a network has, as ``11.0 million``."""
    return f"{sum(weights.numel() for weights in network.parameters()) / 1e6:.3g} million"


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(device: torch.device) -> torch.dtype:
    """What matrix products and convolutions compute in: bfloat16 if the device has it, else float16 or float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_bfloat16() else torch.float32


def describe(device: torch.device) -> str:
    """The device in words, for the model card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
