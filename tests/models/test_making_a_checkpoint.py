"""The commands one after another, for a few steps: drawings, autoencoder, UNet with text encoder, evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file

from models import autoencoder, denoiser, evaluate
from models.checkpoint import load_parts
from models.drawings import open_drawings
from models.latents import encode_drawings
from models.networks import SIZES
from models.retrieval import Gallery, share_within
from worker.engines.diffusion.model import open_model

TINY = {
    "unet": {"block_out_channels": (16, 16, 32), "layers_per_block": 1, "attention_head_dim": 2},
    "text": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@pytest.fixture(scope="module")
def checkpoint(emoji_folder: Path) -> Path:
    """A checkpoint with tiny networks, a few steps old."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", TINY)
        run(autoencoder, "--folder", emoji_folder, "--steps", 2)
        run(denoiser, "--folder", emoji_folder, "--steps", 3, "--things", "all", "--styles", "twemoji,3d")
    return emoji_folder / "emoji-sd"


def run(module: object, *arguments: object) -> Result:
    result = CliRunner().invoke(module.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_checkpoint_is_what_the_worker_loads(checkpoint: Path) -> None:
    model = open_model(str(checkpoint), "cpu")
    assert (model.name, model.native_size, model.is_inpainting) == ("emoji-sd", (256, 256), False)


def test_weights_are_half_precision_safetensors(checkpoint: Path) -> None:
    files = list(checkpoint.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {np.dtype("float16")}


def test_latents_have_unit_spread(checkpoint: Path, emoji_folder: Path) -> None:
    """The scaling factor in the checkpoint was measured on the drawings that it learned from."""
    vae = load_parts(checkpoint).vae
    latents = encode_drawings(open_drawings(emoji_folder), vae, torch.device("cpu"), seed=1)
    assert latents.float().std().item() * vae.config.scaling_factor == pytest.approx(1, rel=0.01)


def test_card_and_notices_travel_with_it(checkpoint: Path) -> None:
    card = (checkpoint / "README.md").read_text()
    assert "dog, lion, whole dog" in card
    assert "cartoon style, 3d style" in card
    assert "Began from nothing (size small), seed 1: 48 samples" in card
    assert "$" not in card
    notice = (checkpoint / "NOTICE").read_text()
    for licence in (checkpoint / "licenses").iterdir():
        assert licence.name in notice
    with Image.open(checkpoint / "examples.png") as examples:
        assert examples.size == (1200, 200)


def test_a_training_can_start_from_a_checkpoint(checkpoint: Path, emoji_folder: Path, tmp_path: Path) -> None:
    """Its autoencoder, vocabulary and size are kept, whatever --size says."""
    further = tmp_path / "further"
    run(denoiser, "--folder", emoji_folder, "--start", checkpoint, "--output", further, "--steps", 1, "--things", 1)
    for part in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "unet/config.json"):
        assert (further / part).read_bytes() == (checkpoint / part).read_bytes()
    configurations = "".join(file.read_text() for file in further.rglob("*.json"))
    assert str(emoji_folder.parent) not in configurations
    assert "Began from emoji-sd" in (further / "README.md").read_text()


def test_evaluation_draws_a_sheet_and_counts(checkpoint: Path, emoji_folder: Path, tmp_path: Path) -> None:
    result = run(evaluate, checkpoint, "--folder", emoji_folder, "--output", tmp_path, "--things", 2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1536
    written = json.loads((tmp_path / "scores.json").read_text())
    assert list(written["scores"]) == ["from the name, twemoji", "from the dog, twemoji"]
    assert [name for name, _, _ in written["ranks"]["from the dog"]] == ["dog", "lion"]
    assert "from the name, twemoji" in result.output


def test_a_missing_autoencoder_names_the_command_that_makes_it(emoji_folder: Path, tmp_path: Path) -> None:
    for name in ("drawings.json", "drawings.npy"):
        (tmp_path / name).symlink_to(emoji_folder / name)
    result = CliRunner().invoke(denoiser.main, ["--folder", str(tmp_path)])
    assert "run python -m models.autoencoder first" in result.output
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--things", "0", "'0' is no number of things: write 36, or all"),
        ("--styles", "twemoji,oil", "'oil' is no style: take of twemoji, noto, flat, 3d, with commas, or all"),
    ],
)
def test_wrong_options_say_what_to_write(option: str, value: str, message: str) -> None:
    result = CliRunner().invoke(denoiser.main, [option, value])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_drawing_is_found_even_moved_and_mirrored(emoji_folder: Path) -> None:
    drawings = open_drawings(emoji_folder)
    gallery = Gallery(drawings, "twemoji")
    for row, name in enumerate(("dog", "lion", "whole dog")):
        drawing = Image.fromarray(drawings.pictures[row])
        picture = Image.new("RGB", drawing.size, "white")
        picture.paste(drawing, (9, -7), drawing)
        turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert [gallery.rank(image, name) for image in (picture, turned)] == [1, 1]
        assert sorted(gallery.rank(picture, other) for other in gallery.names) == [1, 2, 3]


def test_a_score_is_the_share_of_ranks_within_a_limit() -> None:
    assert [share_within([1, 2, 5, 6], limit) for limit in (1, 5)] == [0.25, 0.75]
