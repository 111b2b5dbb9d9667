"""Where the commands put pictures: into files, whose names say their formats, or on standard output."""

import sys
from pathlib import Path
from typing import Final

import click

STANDARD_OUTPUT: Final = "-"
SUFFIXES: Final = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def format_of(output: str) -> str | None:
    """The format that a file's name asks for; None where it says nothing.

    Raises:
        click.BadParameter: the suffix is of no format that pictures can have.
    """
    suffix = "" if output == STANDARD_OUTPUT else Path(output).suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise click.BadParameter(
            f"pictures cannot be {suffix}: end {output} in .png, .webp or .jpg, or say --format", param_hint="--output"
        )
    return SUFFIXES.get(suffix)


def check_file(file: Path, option: str) -> None:
    """See before any work that a file can be made.

    Raises:
        click.BadParameter: its folder is missing, or it is a folder itself.
    """
    if file.is_dir():
        raise click.BadParameter(f"{file} is a folder", param_hint=option)
    if not file.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {file.parent}", param_hint=option)


def check_output(output: str) -> None:
    """As ``check_file``, for what ``--output`` says."""
    if output != STANDARD_OUTPUT:
        check_file(Path(output), "--output")


def write_picture(output: str, data: bytes) -> None:
    """Put a picture's file where ``--output`` says."""
    if output == STANDARD_OUTPUT:
        sys.stdout.buffer.write(data)
    else:
        Path(output).write_bytes(data)


def write_whole(file: Path, data: bytes) -> None:
    """Put ``data`` in the place of ``file`` at once, so that no viewer reads half of it."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(data)
    part.replace(file)
