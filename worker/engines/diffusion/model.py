"""The networks of one checkpoint on one device, each behind one method, without any sampling arithmetic.

Rows of a batch are independent: ``predict_noise`` takes as many as memory allows, each with its own timestep.
"""

from typing import Any, Final, NamedTuple

import torch

from img2img.errors import ConfigurationError
from worker.engines.diffusion.compiling import compile_unet
from worker.engines.diffusion.graphs import Forward, Graphed
from worker.engines.diffusion.loading import Checkpoint, load_checkpoint
from worker.engines.diffusion.samplers import Samplers

VAE_FACTOR: Final = 8
TILE_ABOVE: Final = 1024
LAYOUT: Final = torch.channels_last
"""What convolutions run fastest on: on a CPU the bundled VAE takes 40 % less time at 512x512, the UNet 6 to 9 %."""
PRECISIONS: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE: Final = 100_000_000
"""Parameters of a UNet from which on it fills a CPU by itself, and bfloat16 pays there."""


class Text(NamedTuple):
    """An encoded prompt: ``embeddings`` (1, window, features); ``kept`` of its ``tokens`` fitted."""

    embeddings: torch.Tensor
    kept: int
    tokens: int


class DiffusionModel:
    """A loaded checkpoint. Latents are float32 and scaled for the UNet; networks run in ``dtype``.

    Not thread-safe: one thread owns it. Call its methods under ``torch.inference_mode()``.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        self.name = checkpoint.name
        self.revision = checkpoint.revision
        self.weights = checkpoint.weights
        self.precision = str(dtype).removeprefix("torch.")
        self.samplers = Samplers(checkpoint.scheduler_config)
        self.device = device
        self._dtype = dtype
        self._tokenizer = checkpoint.tokenizer
        self._text_encoder = self._place(checkpoint.text_encoder)
        self._unet = self._place(checkpoint.unet)
        self._vae = self._place(checkpoint.vae)
        self._forward: Forward = self._run_unet
        if compiled:
            self._unet = compile_unet(self._unet)
        if device.type == "cuda":
            self._forward = Graphed(self._run_unet)

    @property
    def native_size(self) -> tuple[int, int]:
        """The (width, height) in pixels that the UNet was trained at."""
        side = self._unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return width * VAE_FACTOR, height * VAE_FACTOR

    @property
    def is_large(self) -> bool:
        """Whether the UNet has many parameters, as Stable Diffusion's has."""
        return bool(sum(weights.numel() for weights in self._unet.parameters()) >= LARGE)

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latents (9 input channels)."""
        return bool(self._unet.config.in_channels == 9)

    @property
    def samples_latents(self) -> bool:
        """Whether encoding a picture draws noise (AutoencoderKL does, AutoencoderTiny does not)."""
        return bool(self._vae.config._class_name == "AutoencoderKL")

    @property
    def memory_bytes(self) -> int:
        """What torch has taken of the device's memory; 0 on a CPU, where nobody counts it."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def works(self) -> bool:
        """Whether the device can be used at all: after some errors nothing works in a process any more."""
        try:
            return bool(torch.ones((), device=self.device).item() == 1)
        except torch.OutOfMemoryError:
            return True  # it is full, and says so as it should
        except RuntimeError:
            return False

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
        encoded = self._vae.encode(self._laid_out(pixels))
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
        pixels: torch.Tensor = self._vae.decode(self._laid_out(latents / self._scaling_factor)).sample
        return pixels.float()

    def predict_noise(self, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """One UNet forward of latents (N, 4 or 9, h, w), timesteps () or (N,) and embeddings (N, window, D).

        Returns float32 (N, 4, h, w): what the scheduler's prediction type says, noise for most models.
        """
        return self._forward(self._laid_out(latents), timesteps, embeddings.to(self._dtype)).float()

    def _run_unet(self, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self._unet(latents, timesteps, encoder_hidden_states=embeddings).sample
        return prediction

    def draw_noise(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Standard normal float32 noise, drawn on the CPU so that a seed means the same on every device."""
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device)

    def _place(self, network: Any) -> Any:
        network = network.to(self.device, self._dtype).eval().requires_grad_(False)
        return network.to(memory_format=LAYOUT)

    def _laid_out(self, images: torch.Tensor) -> torch.Tensor:
        """A network's input (N, C, h, w) in the one layout: equal numbers in another one round differently."""
        return images.to(self.device, self._dtype).contiguous(memory_format=LAYOUT)

    @property
    def _scaling_factor(self) -> float:
        return float(self._vae.config.scaling_factor)

    def _tile(self, size: torch.Size | tuple[int, ...], factor: int) -> None:
        """Work in tiles above 1024 pixels a side: by size only, so that no result depends on free memory."""
        if max(size) * factor > TILE_ABOVE:
            self._vae.enable_tiling()
        else:
            self._vae.disable_tiling()


def open_model(
    source: str, device: str | torch.device, precision: str = "auto", *, compiled: bool = False
) -> DiffusionModel:
    """Load ``source`` onto ``device``; ``precision`` is float32, bfloat16, float16 or auto, see :func:`choose_dtype`.
    ``compiled`` has torch compile the UNet.

    Raises:
        ConfigurationError: names IMG2IMG_MODEL or IMG2IMG_DEVICE and what to set it to.
    """
    (chosen,) = resolve_devices(device) if isinstance(device, str) else (device,)
    checkpoint = load_checkpoint(source)
    parameters = sum(weights.numel() for weights in checkpoint.unet.parameters())
    dtype = choose_dtype(precision, chosen, parameters)
    try:
        return DiffusionModel(checkpoint, chosen, dtype, compiled=compiled)
    except torch.OutOfMemoryError as exc:
        raise ConfigurationError(
            f"IMG2IMG_MODEL={source} does not fit into the memory of {chosen}: stop what else runs there, or "
            "set IMG2IMG_DEVICE to another device"
        ) from exc


def choose_dtype(precision: str, device: torch.device, parameters: int) -> torch.dtype:
    """The number format of the networks. By default float16 on CUDA, whose three more bits than bfloat16's keep a
    picture closer to the CPU's; on a CPU bfloat16 if it computes with that itself and the network is large, else
    float32.

    Measured with Stable Diffusion 1.5 on a CPU with AVX512-BF16: less than half of float32's time. A small network
    gains little and loses its precision.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if parameters >= LARGE and has_bfloat16() else torch.float32


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_devices(names: str) -> tuple[torch.device, ...]:
    """The torch devices that ``IMG2IMG_DEVICE`` means, with commas between; ``auto`` is CUDA where there is one.

    Raises:
        ConfigurationError: no such device on this machine, or one is named twice.
    """
    devices = tuple(_resolve_device(name.strip()) for name in names.split(","))
    if len(set(devices)) < len(devices):
        raise ConfigurationError(f"IMG2IMG_DEVICE={names} names a device twice: name each once")
    return devices


def _resolve_device(device: str) -> torch.device:
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
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def _unusable(device: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"IMG2IMG_DEVICE={device} {reason}: use auto, cpu, cuda or cuda:1, or several as cuda:0,cuda:1"
    )
