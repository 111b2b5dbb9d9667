"""One task from prompt to picture: everything but the steps, which many tasks take together.

Random numbers are drawn in diffusers' order from one CPU generator (VAE sample, noise, masked picture's VAE sample,
sampler noise), all of them before the first step, so that a seed gives the picture that diffusers' pipelines give,
whatever else is made meanwhile, and a task that is resumed needs no generator's state.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import structlog
import torch
from PIL import Image as PillowImage

from img2img.errors import EngineFailed, Img2ImgError, ModelRefused
from img2img.jobs import Stage
from worker.engines import base
from worker.engines.base import Checkpoint, Image, Output, Pictures, Progress, Task
from worker.engines.diffusion.checkpoints import restore
from worker.engines.diffusion.inpainting import Blend, extra_channels, paste, shrink_mask
from worker.engines.diffusion.model import VAE_FACTOR, DiffusionModel
from worker.engines.diffusion.pixels import fit, mask_to_pixels, picture_to_pixels, pixels_to_picture
from worker.engines.diffusion.receipts import make_receipt
from worker.engines.diffusion.samplers import Schedule, count_steps
from worker.engines.diffusion.sampling import Sampling, not_finite

log = structlog.get_logger(__name__)


def paint(
    model: DiffusionModel, task: Task, pictures: Pictures, resume: Checkpoint | None = None, rows: int | None = None
) -> Generator[Output | Sampling]:
    """Make the picture of ``task``; closing the iterator between two items ends the work.

    Its one ``Sampling`` is yielded when its first step can be taken: whoever iterates takes the steps, and goes on when
    they are done. ``rows`` is how many rows each pass will have, for the receipt, where that is fixed.

    Raises:
        ModelRefused: strength times steps is less than one step, or a mask came without a picture.
        EngineFailed: out of memory, numbers that are not finite, or anything else torch reports.
    """
    with translated_errors(task, model.device):
        _check(task, pictures)
        yield Progress(Stage.ENCODE_TEXT)
        embeddings, warnings = _encode_prompts(model, task)
        yield from warnings
        image, mask = _fit_inputs(task, pictures)
        if image is not None:
            yield Progress(Stage.ENCODE_IMAGE)
        sampling = _begin(model, task, embeddings, image, mask)
        if resume is not None:
            restore(sampling, resume, task, model)
        yield Progress(Stage.STEPS, sampling.step, sampling.steps)
        yield sampling
        yield Progress(Stage.DECODE_IMAGE)
        picture = _decode(model, sampling.latents)
        picture = picture if image is None or mask is None else paste(picture, image, mask)
        yield Image(picture, make_receipt(model, sampling.schedule, picture, rows))


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


def _begin(
    model: DiffusionModel,
    task: Task,
    embeddings: torch.Tensor,
    image: PillowImage.Image | None,
    mask: torch.Tensor | None,
) -> Sampling:
    """Draw all of the noise and encode the input; without a mask a 9-channel UNet regenerates everything."""
    generator = torch.Generator().manual_seed(task.seed)
    schedule = model.samplers.schedule(task.sampler, task.num_steps, 1.0 if image is None else task.strength)
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
    if from_noise or original is None:
        latents = schedule.pure_noise * noise
    else:
        latents = schedule.start_clean * original + schedule.start_noise * noise
    sampling = Sampling(schedule, embeddings, task.guidance, latents)
    if mask is not None and model.is_inpainting:
        sampling.extra = extra_channels(model, pixels, mask, generator)
    elif mask is not None and original is not None:
        if model.samples_latents:
            # diffusers encodes the masked picture here too and has no use for it; only its draw matters.
            model.draw_noise(shape, generator)
        sampling.blend = Blend(original, noise, shrink_mask(mask).to(model.device))
    sampling.noises = _step_noises(model, schedule, shape, generator)
    return sampling


def _step_noises(
    model: DiffusionModel, schedule: Schedule, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor | None:
    """What the sampler will draw, step by step: (steps, 4, h, w)."""
    if not schedule.draws_noise:
        return None
    return torch.cat([model.draw_noise(shape, generator) for _ in schedule.steps])


def _decode(model: DiffusionModel, latents: torch.Tensor) -> PillowImage.Image:
    pixels = model.decode_latents(latents)
    if not torch.isfinite(pixels).all():
        raise not_finite(model, "Decoding the picture")
    return pixels_to_picture(pixels)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def translated_errors(task: Task, device: torch.device) -> Iterator[None]:
    """Turn what torch and diffusers raise into the service's errors."""
    try:
        yield
    except Img2ImgError:
        raise
    except Exception as exc:
        if is_out_of_memory(exc):
            raise EngineFailed(
                f"{device} ran out of memory at {task.width}x{task.height}: ask for a smaller picture"
            ) from exc
        log.exception("model_failed", device=str(device))
        raise EngineFailed(f"The model failed with {type(exc).__name__}: see the worker's log") from exc
