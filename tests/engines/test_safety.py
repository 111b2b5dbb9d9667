"""The safety checker: a tiny one whose thresholds flag everything or nothing, in a folder like the published one."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from img2img.errors import ConfigurationError
from img2img.settings import Settings
from worker.engines.diffusion.safety import FILES, WEIGHTS, DiffusionSafetyChecker
from worker.main import choose_checker
from worker.safety import FakeSafetyChecker, check_picture

EVERYTHING, NOTHING = -2.0, 2.0
"""Thresholds below and above any cosine."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checker that flags nothing."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16, "projection_dim": 8,
    }  # fmt: skip
    network = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    network.concept_embeds_weights.data.fill_(NOTHING)
    network.special_care_embeds_weights.data.fill_(NOTHING)
    network.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **values: float) -> None:
    """Fill tensors of the checkpoint with one value each."""
    tensors = load_file(folder / WEIGHTS)
    for name, value in values.items():
        tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, folder / WEIGHTS)


def test_it_flags_what_is_close_to_a_concept(folder, dog):
    assert DiffusionSafetyChecker(str(folder)).is_unsafe(dog) is False

    change(folder, concept_embeds_weights=EVERYTHING)

    assert DiffusionSafetyChecker(str(folder)).is_unsafe(dog) is True


def test_what_needs_special_care_is_flagged_a_little_sooner(folder, dog):
    """diffusers lowers the thresholds by a hundredth for such pictures; alone that flags nothing."""
    change(folder, special_care_embeds_weights=EVERYTHING)

    assert DiffusionSafetyChecker(str(folder)).is_unsafe(dog) is False


def test_it_changes_no_picture(folder, dog):
    """diffusers blackens what it flags; here a flagged picture is an error, and never a black one."""
    change(folder, concept_embeds_weights=EVERYTHING)
    before = dog.tobytes()

    DiffusionSafetyChecker(str(folder)).is_unsafe(dog)

    assert dog.tobytes() == before


@pytest.mark.parametrize(("name", "nested"), [("vision_model.", "vision_model.vision_model.")])
def test_the_published_names_of_weights_are_known(folder, dog, name, nested):
    """They were saved by a transformers whose encoder had one level more; none is left at random."""
    tensors = load_file(folder / WEIGHTS)
    saved = {f"{nested}{key.removeprefix(name)}" if key.startswith(name) else key: tensors[key] for key in tensors}
    assert saved.keys() != tensors.keys()
    save_file(saved | {"vision_model.vision_model.embeddings.position_ids": torch.arange(5)}, folder / WEIGHTS)

    loaded = DiffusionSafetyChecker(str(folder))._network.state_dict()

    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()

    with pytest.raises(ConfigurationError, match=f"IMG2IMG_SAFETY_CHECKER=.* lacks {name}.*: it must hold config.json"):
        DiffusionSafetyChecker(str(folder))


def test_weights_that_are_missing_are_refused(folder):
    """A network with weights drawn at random would flag at random."""
    tensors = load_file(folder / WEIGHTS)
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / WEIGHTS)

    with pytest.raises(ConfigurationError, match=r"lacks weights, such as visual_projection\.weight"):
        DiffusionSafetyChecker(str(folder))


def test_damaged_weights_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"no weights")

    with pytest.raises(ConfigurationError, match="cannot be loaded: "):
        DiffusionSafetyChecker(str(folder))


def test_what_is_no_folder_and_no_hub_id_is_refused():
    with pytest.raises(ConfigurationError, match="is no folder here and could not be downloaded"):
        DiffusionSafetyChecker("/missing/safety/checker")


async def test_the_setting_decides_what_checks(folder, dog):
    assert choose_checker(Settings()) is None
    assert isinstance(choose_checker(Settings(safety_checker="fake")), FakeSafetyChecker)
    checker = choose_checker(Settings(safety_checker=str(folder)))
    assert isinstance(checker, DiffusionSafetyChecker)
    await check_picture(checker, dog)
