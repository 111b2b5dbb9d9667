"""The networks of one checkpoint on one device, each behind one method, without any sampling arithmetic.

Rows of a batch are independent: ``predict_noise`` takes as many as memory allows, each with its own timestep.
"""

from typing import Any, Final, NamedTuple

import torch

from img2img.errors import ConfigurationError
from worker.engines.diffusion.loading import Checkpoint, load_checkpoint

VAE_FACTOR: Final = 8
TILE_ABOVE: Final = 1024


class Text(NamedTuple):
    """An encoded prompt: ``embeddings`` (1, window, features); ``kept`` of its ``tokens`` fitted."""

    embeddings: torch.Tensor
    kept: int
    tokens: int


class DiffusionModel:
    """A loaded checkpoint. Latents are float32 and scaled for the UNet; networks run in ``dtype``.

    Not thread-safe: one thread owns it. Call its methods under ``torch.inference_mode()``.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.name = checkpoint.name
        self.scheduler_config = checkpoint.scheduler_config
        self.device = device
        self._dtype = dtype
        self._tokenizer = checkpoint.tokenizer
        self._text_encoder = self._place(checkpoint.text_encoder)
        self._unet = self._place(checkpoint.unet)
        self._vae = self._place(checkpoint.vae)

    @property
    def native_size(self) -> tuple[int, int]:
        """The (width, height) in pixels that the UNet was trained at."""
        side = self._unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return width * VAE_FACTOR, height * VAE_FACTOR

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latents (9 input channels)."""
        return bool(self._unet.config.in_channels == 9)

    @property
    def samples_latents(self) -> bool:
        """Whether encoding a picture draws noise (AutoencoderKL does, AutoencoderTiny does not)."""
        return bool(self._vae.config._class_name == "AutoencoderKL")

    def encode_text(self, text: str) -> Text:
        """Encode a prompt, cut to the text encoder's window (its begin and end marks included)."""
        window = min(self._tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings)
        whole = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        encoded = self._tokenizer(text, padding="max_length", max_length=window, truncation=True, return_tensors="pt")
        embeddings = self._text_encoder(encoded.input_ids.to(self.device))[0]
        tokens = len(whole.input_ids)
        return Text(embeddings, min(tokens, window - 2), tokens)

    def encode_picture(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pixels (1, 3, H, W) in -1..1 to latents (1, 4, H/8, W/8); a KL VAE draws one sample of noise."""
        self._tile(pixels.shape[-2:], 1)
        encoded = self._vae.encode(pixels.to(self.device, self._dtype))
        if not self.samples_latents:
            latents = encoded.latents.float()
        else:
            posterior = encoded.latent_dist
            noise = self.draw_noise(posterior.mean.shape, generator)
            latents = posterior.mean.float() + posterior.std.float() * noise
        scaled: torch.Tensor = self._scaling_factor * latents
        return scaled

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (1, 4, h, w) to float32 pixels (1, 3, 8h, 8w), about -1..1."""
        self._tile(latents.shape[-2:], VAE_FACTOR)
        pixels: torch.Tensor = self._vae.decode((latents / self._scaling_factor).to(self._dtype)).sample
        return pixels.float()

    def predict_noise(self, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """One UNet forward of latents (N, 4 or 9, h, w), timesteps () or (N,) and embeddings (N, window, D).

        Returns float32 (N, 4, h, w): what the scheduler's prediction type says, noise for most models.
        """
        prediction: torch.Tensor = self._unet(
            latents.to(self._dtype), timesteps, encoder_hidden_states=embeddings.to(self._dtype)
        ).sample
        return prediction.float()

    def draw_noise(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Standard normal float32 noise, drawn on the CPU so that a seed means the same on every device."""
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device)

    def _place(self, network: Any) -> Any:
        """Move a network to the device; channels-last is what CUDA's convolutions run fastest on."""
        network = network.to(self.device, self._dtype).eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last) if self.device.type == "cuda" else network

    @property
    def _scaling_factor(self) -> float:
        return float(self._vae.config.scaling_factor)

    def _tile(self, size: torch.Size | tuple[int, ...], factor: int) -> None:
        """Work in tiles above 1024 pixels a side: by size only, so that no result depends on free memory."""
        if max(size) * factor > TILE_ABOVE:
            self._vae.enable_tiling()
        else:
            self._vae.disable_tiling()


def open_model(source: str, device: str) -> DiffusionModel:
    """Load ``source`` onto ``device`` (auto, cpu, cuda, cuda:N): float16 on CUDA, float32 on the CPU.

    float16 rather than bfloat16: its three more bits of precision keep a picture closer to the CPU's.

    Raises:
        ConfigurationError: names IMG2IMG_MODEL or IMG2IMG_DEVICE and what to set it to.
    """
    chosen = resolve_device(device)
    checkpoint = load_checkpoint(source)
    try:
        return DiffusionModel(checkpoint, chosen, torch.float16 if chosen.type == "cuda" else torch.float32)
    except torch.OutOfMemoryError as exc:
        raise ConfigurationError(
            f"IMG2IMG_MODEL={source} does not fit into the memory of {chosen}: stop what else runs there, or "
            "set IMG2IMG_DEVICE to another device"
        ) from exc


def resolve_device(device: str) -> torch.device:
    """The torch device that ``IMG2IMG_DEVICE`` means; ``auto`` is CUDA where there is one.

    Raises:
        ConfigurationError: no such device on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as exc:
        raise _unusable(device, "is no device") from exc
    if chosen.type not in ("cpu", "cuda"):
        raise _unusable(device, "is not supported")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise _unusable(device, f"is not there (torch sees {torch.cuda.device_count()} CUDA devices)")
    return chosen


def _unusable(device: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"IMG2IMG_DEVICE={device} {reason}: use auto, cpu, cuda or cuda:1")
