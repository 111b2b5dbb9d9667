"""One task from prompt to picture, step by step, in the thread that owns the model.

Random numbers are drawn in diffusers' order from one CPU generator (VAE sample, noise, masked picture's VAE
sample, sampler noise), so that a seed gives the picture that diffusers' pipelines give.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
import torch
from PIL import Image as PillowImage

from img2img.errors import EngineFailed, Img2ImgError, ModelRefused
from img2img.jobs import Stage
from worker.engines import base
from worker.engines.base import Image, Output, Pictures, Progress, Task
from worker.engines.diffusion.inpainting import Blend, extra_channels, paste, shrink_mask
from worker.engines.diffusion.model import VAE_FACTOR, DiffusionModel
from worker.engines.diffusion.pixels import fit, mask_to_pixels, picture_to_pixels, pixels_to_picture
from worker.engines.diffusion.samplers import Schedule, build_schedule, count_steps, guide

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Canvas:
    """Where sampling starts: ``latents`` (1, 4, h, w), and with a mask what the UNet or the steps need."""

    latents: torch.Tensor
    extra: torch.Tensor | None = None
    blend: Blend | None = None


def paint(model: DiffusionModel, task: Task, pictures: Pictures) -> Generator[Output]:
    """Make the picture of ``task``; closing the iterator between two items ends the work.

    Raises:
        ModelRefused: strength times steps is less than one step, or a mask came without a picture.
        EngineFailed: out of memory, numbers that are not finite, or anything else torch reports.
    """
    with _translated_errors(task, model.device), torch.inference_mode():
        _check(task, pictures)
        yield Progress(Stage.ENCODE_TEXT)
        embeddings, warnings = _encode_prompts(model, task)
        yield from warnings
        strength = 1.0 if pictures.image is None else task.strength
        schedule = build_schedule(task.sampler, model.scheduler_config, task.num_steps, strength, model.device)
        image, mask = _fit_inputs(task, pictures)
        if image is not None:
            yield Progress(Stage.ENCODE_IMAGE)
        generator = torch.Generator().manual_seed(task.seed)
        canvas = _prepare(model, task, schedule, image, mask, generator)
        yield Progress(Stage.STEPS, 0, len(schedule))
        latents = canvas.latents
        for index in range(len(schedule)):
            latents = _step(model, schedule, canvas, embeddings, latents, index, task.guidance, generator)
            yield Progress(Stage.STEPS, index + 1, len(schedule))
        yield Progress(Stage.DECODE_IMAGE)
        picture = _decode(model, latents)
        yield Image(picture if image is None or mask is None else paste(picture, image, mask))


def _check(task: Task, pictures: Pictures) -> None:
    if pictures.mask is not None and pictures.image is None:
        raise ModelRefused("A mask needs the picture that it masks: send 'image' too")
    if pictures.image is not None and count_steps(task.num_steps, task.strength) < 1:
        raise ModelRefused("strength times num_steps is less than one step: raise one of them")


def _encode_prompts(model: DiffusionModel, task: Task) -> tuple[torch.Tensor, list[base.Notice]]:
    """Embeddings (1 or 2, window, features), the negative prompt's first where guidance uses it."""
    prompts = {"prompt": task.prompt}
    if task.guidance > 1:
        prompts = {"negative_prompt": task.negative_prompt, **prompts}
    texts = {name: model.encode_text(text) for name, text in prompts.items()}
    warnings = [
        base.Notice(f"{name} was cut to what the model reads: {text.kept} of its {text.tokens} tokens were kept")
        for name, text in texts.items()
        if text.kept < text.tokens
    ]
    return torch.cat([text.embeddings for text in texts.values()]), warnings


def _fit_inputs(task: Task, pictures: Pictures) -> tuple[PillowImage.Image | None, torch.Tensor | None]:
    """The input picture at the task's size, and the mask as a tensor (1, 1, height, width)."""
    size = (task.width, task.height)
    image = None if pictures.image is None else fit(pictures.image, size)
    mask = None if pictures.mask is None else mask_to_pixels(fit(pictures.mask, size))
    return image, mask


def _prepare(
    model: DiffusionModel,
    task: Task,
    schedule: Schedule,
    image: PillowImage.Image | None,
    mask: torch.Tensor | None,
    generator: torch.Generator,
) -> Canvas:
    """Draw the noise and encode the input; without a mask a 9-channel UNet regenerates everything."""
    pixels = torch.zeros(1, 3, task.height, task.width) if image is None else picture_to_pixels(image)
    if mask is None and model.is_inpainting:
        mask = torch.ones(1, 1, task.height, task.width)
    # At full strength diffusers' inpainting starts from pure noise, its image-to-image from a noised picture.
    from_noise = image is None or (mask is not None and task.strength == 1.0)
    original = None
    if image is not None and not (from_noise and model.is_inpainting):
        original = model.encode_picture(pixels, generator)
    shape = (1, 4, task.height // VAE_FACTOR, task.width // VAE_FACTOR)
    noise = model.draw_noise(shape, generator)
    start = None if from_noise else original
    latents = schedule.pure_noise(noise) if start is None else schedule.add_noise(start, noise, 0)
    if mask is not None and model.is_inpainting:
        return Canvas(latents, extra=extra_channels(model, pixels, mask, generator))
    if mask is None or original is None:
        return Canvas(latents)
    if model.samples_latents:
        # diffusers encodes the masked picture here too and has no use for it; only its draw matters.
        model.draw_noise(shape, generator)
    return Canvas(latents, blend=Blend(original, noise, shrink_mask(mask).to(model.device)))


def _step(
    model: DiffusionModel,
    schedule: Schedule,
    canvas: Canvas,
    embeddings: torch.Tensor,
    latents: torch.Tensor,
    index: int,
    guidance: float,
    generator: torch.Generator,
) -> torch.Tensor:
    rows = len(embeddings)
    inputs = schedule.scale_input(latents.repeat(rows, 1, 1, 1), index)
    if canvas.extra is not None:
        inputs = torch.cat([inputs, canvas.extra.repeat(rows, 1, 1, 1)], dim=1)
    prediction = model.predict_noise(inputs, schedule.timestep(index), embeddings)
    if rows == 2:
        prediction = guide(prediction, guidance)
    latents = schedule.step(prediction, latents, index, generator)
    if canvas.blend is not None:
        latents = canvas.blend.apply(latents, schedule, index)
    # This also waits for the device, so progress and cancellation are never ahead of the work.
    if not torch.isfinite(latents).all():
        raise EngineFailed(
            f"Step {index + 1} of {len(schedule)} gave numbers that are not finite: lower guidance, or use "
            "another sampler"
        )
    return latents


def _decode(model: DiffusionModel, latents: torch.Tensor) -> PillowImage.Image:
    pixels = model.decode_latents(latents)
    if not torch.isfinite(pixels).all():
        raise EngineFailed("Decoding the picture gave numbers that are not finite: lower guidance")
    return pixels_to_picture(pixels)


@contextmanager
def _translated_errors(task: Task, device: torch.device) -> Iterator[None]:
    """Turn what torch and diffusers raise into the service's errors."""
    try:
        yield
    except Img2ImgError:
        raise
    except Exception as exc:
        if isinstance(exc, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(exc):
            raise EngineFailed(
                f"{device} ran out of memory at {task.width}x{task.height}: ask for a smaller picture"
            ) from exc
        log.exception("model_failed", device=str(device))
        raise EngineFailed(f"The model failed with {type(exc).__name__}: see the worker's log") from exc
