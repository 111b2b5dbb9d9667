"""Drawings: what is taken of the packages, how it is rendered, and what it is called."""

from pathlib import Path

import click
import numpy as np
import pytest
import torch
from tiny_packages import pack, pack_labels, pack_vectors

from models.drawings import PICTURES, Drawing, open_drawings
from models.latents import lay_out
from models.prepare import prepare
from models.sources import fetch


def test_things_are_named_as_people_say_the_best_known_first(emoji_folder: Path) -> None:
    """A face is what its animal's name means; people, and what comes in skin tones, stay out."""
    drawings = open_drawings(emoji_folder)
    assert drawings.labels == [
        Drawing("dog", "twemoji"),
        Drawing("lion", "twemoji"),
        Drawing("whole dog", "twemoji"),
        Drawing("lion", "3d"),
    ]
    assert drawings.pictures.shape == (4, 256, 256, 4)
    assert drawings.pictures.dtype == np.uint8


def test_drawings_lie_centred_within_a_margin(emoji_folder: Path) -> None:
    """The longer side reaches the margin; the rest is transparent."""
    wide = open_drawings(emoji_folder).pictures[3]
    assert np.array_equal(np.argwhere(wide[..., 3]).min(0), (70, 12))
    assert np.array_equal(np.argwhere(wide[..., 3]).max(0), (185, 243))
    assert tuple(wide[128, 128]) == (0, 0, 255, 255)


def test_an_alias_is_rendered_as_its_parent(emoji_folder: Path) -> None:
    assert tuple(open_drawings(emoji_folder).pictures[1][128, 160]) == (255, 204, 0, 255)


def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        packages = folder / "packages"
        prepare(folder, pack_labels(packages), {"noto": pack_vectors(packages, "@iconify-json/noto")})
    one, two = ((folder / PICTURES).read_bytes() for folder in folders)
    assert one == two


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    package = pack(tmp_path, "emojibase-data", {"en/data.json": b"[]"})
    with pytest.raises(click.ClickException, match=r"emojibase-data-1\.0\.0\.tgz is not the file that was pinned"):
        fetch(package._replace(sha256="0" * 64), tmp_path)


def test_things_and_styles_are_chosen_together(emoji_folder: Path) -> None:
    drawings = open_drawings(emoji_folder)
    assert drawings.choose(2, ("twemoji", "3d")).labels == [*drawings.labels[:2], drawings.labels[3]]
    assert drawings.choose(None, ("3d",)).names == ["lion"]
    with pytest.raises(click.BadParameter, match="no drawing is in noto: take of twemoji, 3d"):
        drawings.choose(None, ("noto",))


def test_missing_drawings_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"run python -m models\.prepare first"):
        open_drawings(tmp_path)


def test_layouts_move_and_mirror_drawings_on_white() -> None:
    """A red left half, mirrored, is a red right half; what is transparent has no colour."""
    picture = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    picture[:, 1] = 255
    picture[:, :, :, :4] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)[:, None, None]
    laid = lay_out(picture, torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]))
    assert laid[0, :, 4, 1].tolist() == [1, 1, 1]
    assert laid[0, :, 4, 6].tolist() == [1, -1, -1]
