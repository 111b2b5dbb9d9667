"""Stable-Diffusion-shaped checkpoints with a few channels and random weights, made in a moment."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from worker.engines.diffusion.loading import BUNDLED

LAYERS = 1
WIDTH = 32

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def make_pipeline(in_channels: int = 4) -> StableDiffusionPipeline:
    """A pipeline with a KL autoencoder, factor 8, native size 64x64 and the bundled tokenizer."""
    torch.manual_seed(in_channels)
    text_config = CLIPTextConfig(
        vocab_size=3072,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            sample_size=64,
        ),
        unet=UNet2DConditionModel(
            in_channels=in_channels,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=LAYERS,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
            sample_size=8,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=CLIPTokenizer.from_pretrained(BUNDLED / "emoji-sd" / "tokenizer", local_files_only=True),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_original_layout(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Save the three networks in one file, named as the original (ldm) repository names its tensors."""
    tensors = {}
    for key, tensor in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_key(key)] = tensor
    for key, tensor in pipeline.vae.state_dict().items():
        name = _vae_key(key)
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name)
        tensors["first_stage_model." + name] = tensor[:, :, None, None] if is_projection else tensor
    for key, tensor in pipeline.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = tensor
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def _unet_key(key: str) -> str:
    stride = LAYERS + 1
    for pattern, replacement in (
        (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^conv_in", lambda m: "input_blocks.0.0"),
        (r"^conv_norm_out", lambda m: "out.0"),
        (r"^conv_out", lambda m: "out.2"),
        (r"^mid_block\.attentions\.0", lambda m: "middle_block.1"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (
            r"^down_blocks\.(\d)\.resnets\.(\d)",
            lambda m: f"input_blocks.{stride * int(m[1]) + int(m[2]) + 1}.0",
        ),
        (
            r"^down_blocks\.(\d)\.attentions\.(\d)",
            lambda m: f"input_blocks.{stride * int(m[1]) + int(m[2]) + 1}.1",
        ),
        (
            r"^down_blocks\.(\d)\.downsamplers\.0\.conv",
            lambda m: f"input_blocks.{stride * (int(m[1]) + 1)}.0.op",
        ),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{stride * int(m[1]) + int(m[2])}.0"),
        (
            r"^up_blocks\.(\d)\.attentions\.(\d)",
            lambda m: f"output_blocks.{stride * int(m[1]) + int(m[2])}.1",
        ),
        (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{stride * int(m[1]) + LAYERS}.1"),
    ):
        key = re.sub(pattern, replacement, key)
    return _rename(key, UNET_RESNET)


def _vae_key(key: str) -> str:
    for pattern, replacement in (
        (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"down.{m[1]}.block.{m[2]}"),
        (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
        (r"conv_norm_out", lambda m: "norm_out"),
        (r"conv_shortcut", lambda m: "nin_shortcut"),
    ):
        key = re.sub(pattern, replacement, key)
    return _rename(key, VAE_ATTENTION)


def _rename(key: str, names: dict[str, str]) -> str:
    for name, original in names.items():
        key = key.replace(f".{name}.", f".{original}.")
    return key
