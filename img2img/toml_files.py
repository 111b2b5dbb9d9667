"""Reads the TOML files that settings name, with errors that say what to mend."""

import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

from img2img.errors import ConfigurationError

T = TypeVar("T")


def read_toml(path: Path, kind: type[T], variable: str, remedy: str) -> T:
    """The file that ``variable`` names, as a ``kind``.

    Raises:
        ConfigurationError: names the file, what is wrong, and the remedy.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), kind)
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read ({exc.strerror}): check {variable}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{path} is not TOML: {exc}: {remedy}") from exc
    except msgspec.ValidationError as exc:
        raise ConfigurationError(f"{path}: {exc}: {remedy}") from exc
