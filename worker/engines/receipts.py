"""What the receipts of all engines have in common."""

import hashlib
from functools import cache
from importlib.metadata import version

from PIL import Image


def pixels_digest(picture: Image.Image) -> str:
    """SHA-256 of an 8-bit RGB picture's pixels, row by row, in lower-case hexadecimal; its size does not count."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


def package_versions(*names: str) -> dict[str, str]:
    """The installed versions of the distributions ``names``.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    return {name: _version(name) for name in names}


@cache
def _version(name: str) -> str:
    return version(name)  # reads files each time
