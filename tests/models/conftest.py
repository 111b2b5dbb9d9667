"""Drawings that the tests of the checkpoint's making share."""

from pathlib import Path

import pytest
from tiny_packages import pack_bitmaps, pack_labels, pack_vectors

from models.prepare import prepare


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawings: three things in one style, one of them in a second."""
    folder = tmp_path_factory.mktemp("emoji")
    packages = folder / "packages"
    styles = {
        "twemoji": pack_vectors(packages, "@iconify-json/twemoji"),
        "3d": pack_bitmaps(packages, "@lobehub/fluent-emoji-3d"),
    }
    prepare(folder, pack_labels(packages), styles)
    return folder
