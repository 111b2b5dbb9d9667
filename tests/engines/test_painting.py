"""What each parameter does to a picture, with the bundled model, and what happens when numbers go wrong."""

import pytest
import torch
from engine_helpers import distance, lane_of, outputs_of, picture_of, submit, task_of, work_until_ended
from PIL import Image, ImageChops

from img2img.errors import EngineFailed, ModelRefused
from img2img.jobs import Stage
from img2img.requests import Sampler
from worker.engines import base
from worker.engines.base import Pictures, Progress
from worker.engines.diffusion.loading import load_checkpoint
from worker.engines.diffusion.model import DiffusionModel, open_model


@pytest.fixture
def tiny(tiny_4_channel_folder) -> DiffusionModel:
    """A model of its own for each test, so that a test may break it."""
    return open_model(str(tiny_4_channel_folder), "cpu")


def test_a_dog_becomes_a_lion(emoji, dog):
    """The seed's example: a lion's mane is brown where the dog's picture was white, above its ears."""
    lion = picture_of(emoji, task_of(num_steps=20, strength=0.9), Pictures(dog))

    red, green, blue = lion.crop((110, 12, 146, 20)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert red > green > blue
    assert red + green + blue < 450


def test_strength_moves_the_picture_away_from_the_input(emoji, dog):
    distances = [
        distance(dog, picture_of(emoji, task_of(num_steps=10, strength=strength), Pictures(dog)))
        for strength in (0.3, 0.6, 0.9)
    ]

    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a panda"},
        {"negative_prompt": "brown"},
        {"guidance": 7.5},
        {"guidance": 1.0},
        {"num_steps": 6},
        {"seed": 2},
        {"seed": 2**64 - 1},
        {"strength": 1.0},
        {"sampler": Sampler.DDIM},
        {"sampler": Sampler.EULER_A},
    ],
    ids=str,
)
def test_each_parameter_changes_the_picture(emoji, dog, change):
    before = picture_of(emoji, task_of(), Pictures(dog))

    assert distance(before, picture_of(emoji, task_of(**change), Pictures(dog))) > 0.5


def test_the_same_seed_gives_the_same_pixels(emoji, dog):
    pictures = [picture_of(emoji, task_of(sampler=Sampler.EULER_A), Pictures(dog)) for _ in range(2)]

    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_dpm_is_the_default_sampler(emoji, dog):
    default = picture_of(emoji, task_of(), Pictures(dog))

    assert default.tobytes() == picture_of(emoji, task_of(sampler=Sampler.DPMPP_2M), Pictures(dog)).tobytes()


@pytest.mark.parametrize("strength", [0.75, 1.0])
def test_pixels_outside_the_mask_stay(emoji, dog, right_half, strength):
    result = picture_of(emoji, task_of(strength=strength), Pictures(dog, right_half))

    difference = ImageChops.difference(result, dog)
    assert difference.crop((0, 0, 128, 256)).getbbox() is None
    assert difference.crop((128, 0, 256, 256)).getbbox() is not None


@pytest.mark.parametrize("size", [(256, 256), (328, 264), (1032, 256)])
@pytest.mark.parametrize("has_input", [False, True])
def test_any_size_that_is_a_multiple_of_8(emoji, dog, right_half, size, has_input):
    width, height = size
    task = task_of(width=width, height=height, num_steps=1, strength=1.0, guidance=1.0)

    assert picture_of(emoji, task, Pictures(dog, right_half) if has_input else Pictures()).size == size


def test_an_input_of_another_size_is_resized(emoji, dog, right_half):
    large = Pictures(dog.resize((400, 300)), right_half.resize((400, 300)))
    resized = Pictures(dog.resize((400, 300)).resize((256, 256), Image.Resampling.LANCZOS), right_half)

    assert picture_of(emoji, task_of(), large).tobytes() == picture_of(emoji, task_of(), resized).tobytes()


def test_tiles_above_1024_pixels_leave_no_seams(emoji, dog):
    """A picture in tiles differs from the whole one by less than the eye sees."""
    pixels = torch.rand(1, 3, 128, 1032, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        tiled = emoji.decode_latents(emoji.encode_picture(pixels, torch.Generator()))
        emoji._vae.disable_tiling()
        whole = emoji._vae.decode(emoji._vae.encode(pixels).latents).sample

    assert (tiled - whole).abs().mean() < 0.02


def test_stages_and_steps_are_reported_in_order(emoji, dog):
    outputs = outputs_of(emoji, task_of(num_steps=4, strength=0.75), Pictures(dog))

    assert [(item.stage, item.step, item.steps) for item in outputs if isinstance(item, Progress)] == [
        (Stage.ENCODE_TEXT, 0, 0),
        (Stage.ENCODE_IMAGE, 0, 0),
        (Stage.STEPS, 0, 3),
        (Stage.STEPS, 1, 3),
        (Stage.STEPS, 2, 3),
        (Stage.STEPS, 3, 3),
        (Stage.DECODE_IMAGE, 0, 0),
    ]
    assert isinstance(outputs[-1], base.Image)
    assert outputs[-1].picture.mode == "RGB"


def test_text_to_image_takes_every_step_and_encodes_no_picture(tiny):
    stages = outputs_of(tiny, task_of(width=64, height=64, strength=0.5))

    assert Progress(Stage.ENCODE_IMAGE) not in stages
    assert Progress(Stage.STEPS, 4, 4) in stages


def test_a_long_prompt_is_cut_with_a_warning(tiny):
    task = task_of(prompt="a lion " * 40, negative_prompt="dog " * 31, width=64, height=64)

    warnings = [item.message for item in outputs_of(tiny, task) if isinstance(item, base.Notice)]

    assert warnings == [
        "negative_prompt was cut to what the model reads: 30 of its 31 tokens were kept",
        "prompt was cut to what the model reads: 30 of its 80 tokens were kept",
    ]


def test_a_prompt_that_just_fits_is_not_cut(tiny):
    outputs = outputs_of(tiny, task_of(prompt="lion " * 30, width=64, height=64))

    assert not [item for item in outputs if isinstance(item, base.Notice)]


def test_the_negative_prompt_needs_guidance_above_1(tiny):
    """As in diffusers: without guidance there is no second row for it."""
    pictures = [
        picture_of(tiny, task_of(width=64, height=64, guidance=1.0, negative_prompt=negative))
        for negative in ("", "a dog")
    ]

    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_less_than_one_step_is_refused(tiny, dog):
    with pytest.raises(ModelRefused, match="less than one step"):
        picture_of(tiny, task_of(num_steps=2, strength=0.4), Pictures(dog))


def test_a_mask_without_a_picture_is_refused(tiny, right_half):
    with pytest.raises(ModelRefused, match="mask"):
        picture_of(tiny, task_of(), Pictures(mask=right_half))


def test_not_finite_latents_fail_at_their_step(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "predict_noise", lambda latents, *_: torch.full_like(latents, torch.nan))
    lane = lane_of(tiny)
    ordered = submit(lane, task_of(width=64, height=64))
    work_until_ended(lane, ordered)

    assert isinstance(ordered.error, EngineFailed)
    assert "Step 1 of 4 gave numbers that are not finite" in str(ordered.error)
    assert Progress(Stage.STEPS, 1, 4) not in ordered.outputs


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_decoder_that_overflows_fails_and_says_what_has_more_room(tiny_4_channel_folder, monkeypatch, precision):
    model = open_model(str(tiny_4_channel_folder), "cpu", precision)
    monkeypatch.setattr(model, "decode_latents", lambda _: torch.full((1, 3, 64, 64), torch.inf))

    with pytest.raises(EngineFailed, match="Decoding the picture gave numbers that are not finite") as caught:
        picture_of(model, task_of(width=64, height=64))
    assert ("IMG2IMG_PRECISION=bfloat16" in str(caught.value)) == (precision == "float16")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_says_what_to_do(tiny, monkeypatch, error):
    def predict_noise(*_):
        raise error

    monkeypatch.setattr(tiny, "predict_noise", predict_noise)

    with pytest.raises(EngineFailed, match="cpu ran out of memory at 64x64: ask for a smaller picture"):
        picture_of(tiny, task_of(width=64, height=64))


def test_other_errors_are_translated(tiny, monkeypatch):
    def predict_noise(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(tiny, "predict_noise", predict_noise)

    with pytest.raises(EngineFailed, match="The model failed with RuntimeError") as caught:
        picture_of(tiny, task_of(width=64, height=64))

    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("has_mask", [False, True])
def test_half_precision_networks_keep_float32_latents(tiny_folder, dog, right_half, has_mask):
    """What a GPU does, on the CPU: latents and sampling stay float32, so the picture stays close."""
    pictures = Pictures(dog, right_half) if has_mask else Pictures(dog)
    task = task_of(width=64, height=64)
    full = picture_of(open_model(str(tiny_folder), "cpu"), task, pictures)
    half = DiffusionModel(load_checkpoint(str(tiny_folder)), torch.device("cpu"), torch.bfloat16)

    assert distance(full, picture_of(half, task, pictures)) < 6
