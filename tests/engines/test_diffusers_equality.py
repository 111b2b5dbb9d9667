"""The same seed gives the picture that diffusers' own pipelines give, in float32 on the CPU."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from engine_helpers import furthest, picture_of, task_of
from PIL import Image

from img2img.requests import Sampler
from worker.engines.base import Pictures
from worker.engines.diffusion.loading import BUNDLED
from worker.engines.diffusion.model import DiffusionModel, open_model

SCHEDULERS = {
    Sampler.DPMPP_2M: DPMSolverMultistepScheduler,
    Sampler.DDIM: DDIMScheduler,
    Sampler.EULER: EulerDiscreteScheduler,
    Sampler.EULER_A: EulerAncestralDiscreteScheduler,
}
PROMPT = "a lion"
NEGATIVE = "a dog"


def pipeline_of(kind, folder: Path, sampler: Sampler):
    pipeline = kind.from_pretrained(folder, safety_checker=None, local_files_only=True, low_cpu_mem_usage=False)
    pipeline = pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # The pipelines insist on clip_sample=False for the scheduler they are made with, not for one set later.
    pipeline.scheduler = SCHEDULERS[sampler].from_config({**pipeline.scheduler.config, "clip_sample": False})
    return pipeline


def expected(kind, folder: Path, task, **inputs) -> Image.Image:
    pipeline = pipeline_of(kind, folder, task.sampler)
    size = {} if kind is StableDiffusionImg2ImgPipeline else {"width": task.width, "height": task.height}
    strength = {} if kind is StableDiffusionPipeline else {"strength": task.strength}
    return pipeline(
        task.prompt,
        negative_prompt=task.negative_prompt,
        num_inference_steps=task.num_steps,
        guidance_scale=task.guidance,
        generator=torch.Generator().manual_seed(task.seed),
        **inputs,
        **size,
        **strength,
    ).images[0]


def tiny_task(sampler: Sampler, **changes: object):
    fields = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "width": 64,
        "height": 72,
        "num_steps": 5,
        "seed": 7,
    }
    return task_of(**fields, sampler=sampler, **changes)


@pytest.fixture
def small_dog(dog: Image.Image) -> Image.Image:
    return dog.resize((64, 72))


@pytest.fixture
def small_mask() -> Image.Image:
    mask = Image.new("L", (64, 72), 0)
    mask.paste(255, (10, 13, 50, 60))
    return mask


@pytest.fixture
def tiny(tiny_folder: Path) -> DiffusionModel:
    return open_model(str(tiny_folder), "cpu")


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_text_to_image(tiny_4_channel_folder, sampler, guidance):
    task = tiny_task(sampler, guidance=guidance)
    model = open_model(str(tiny_4_channel_folder), "cpu")

    reference = expected(StableDiffusionPipeline, tiny_4_channel_folder, task)

    assert furthest(picture_of(model, task), reference) <= 1


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(tiny_4_channel_folder, small_dog, sampler, strength):
    task = tiny_task(sampler, strength=strength)
    model = open_model(str(tiny_4_channel_folder), "cpu")

    reference = expected(StableDiffusionImg2ImgPipeline, tiny_4_channel_folder, task, image=small_dog)

    assert furthest(picture_of(model, task, Pictures(small_dog)), reference) <= 1


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_both_kinds_of_unet(tiny, tiny_folder, small_dog, small_mask, sampler, strength):
    task = tiny_task(sampler, strength=strength)

    reference = expected(StableDiffusionInpaintPipeline, tiny_folder, task, image=small_dog, mask_image=small_mask)

    result = picture_of(tiny, task, Pictures(small_dog, small_mask))
    assert furthest(result, Image.composite(reference, small_dog, small_mask)) <= 1


def test_bundled_model_text_to_image(emoji):
    task = task_of(sampler=Sampler.DPMPP_2M, guidance=7.5)

    reference = expected(StableDiffusionPipeline, BUNDLED / "emoji-sd", task)

    assert furthest(picture_of(emoji, task), reference) <= 1


def test_bundled_model_image_to_image(emoji, dog):
    task = task_of(sampler=Sampler.EULER_A)

    reference = expected(StableDiffusionImg2ImgPipeline, BUNDLED / "emoji-sd", task, image=dog)

    assert furthest(picture_of(emoji, task, Pictures(dog)), reference) <= 1


def test_bundled_model_inpainting(emoji, dog, right_half):
    task = task_of(sampler=Sampler.DDIM)

    reference = expected(StableDiffusionInpaintPipeline, BUNDLED / "emoji-sd", task, image=dog, mask_image=right_half)

    result = picture_of(emoji, task, Pictures(dog, right_half))
    assert furthest(result, Image.composite(reference, dog, right_half)) <= 1


def test_an_inpainting_unet_without_a_mask_regenerates_everything(tiny_9_channel_folder, small_dog):
    """It has no text-to-image or image-to-image pipeline in diffusers; a white mask is what they would mean."""
    white = Image.new("L", small_dog.size, 255)
    task = tiny_task(Sampler.DDIM, strength=1.0)
    model = open_model(str(tiny_9_channel_folder), "cpu")

    with_mask = picture_of(model, task, Pictures(small_dog, white))

    assert furthest(picture_of(model, task, Pictures(small_dog)), with_mask) <= 1
    assert furthest(picture_of(model, task), with_mask) <= 1
