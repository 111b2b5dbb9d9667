"""Fetch the drawings and render them to one array of 256x256 RGBA pictures.

    python -m models.prepare [--folder build/emoji]

The same packages give the same array, byte for byte.
"""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Final

import click
import numpy as np
import resvg_py
from PIL import Image
from rich.console import Console
from rich.progress import track

from models.drawings import INDEX, PICTURES, SIDE, Drawing, Pictures, open_drawings
from models.options import folder_option
from models.sources import LABELS, STYLES, Package, fetch, read_drawings, read_labels
from models.things import Thing, plain_code, things_of

MARGIN: Final = 12
"""Pixels around a drawing."""


def render(source: str | bytes) -> Image.Image:
    """An SVG as large as it fits, without system fonts, which differ between machines; a bitmap as it is."""
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    side = SIDE - 2 * MARGIN
    data = resvg_py.svg_to_bytes(svg_string=source, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data)))


def centre(picture: Image.Image) -> Pictures:
    """The picture on a transparent square, its longer side to the margin: (256, 256, 4) uint8."""
    picture = picture.convert("RGBA")
    scale = (SIDE - 2 * MARGIN) / max(picture.size)
    if scale != 1:
        width, height = (round(side * scale) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return np.asarray(square)


def collect(style: str, package: Package, tarball: Path, things: list[Thing]) -> list[tuple[Drawing, str | bytes]]:
    """What to render of one package, in the order of ``things``; what it does not draw is left out."""
    sources: dict[str, str | bytes] = {}
    for code, source in read_drawings(package, tarball):
        sources.setdefault(plain_code(code), source)
    return [(Drawing(thing.name, style), sources[thing.code]) for thing in things if thing.code in sources]


def prepare(folder: Path, labels: Package, styles: dict[str, Package]) -> None:
    """Render the drawings of packages by style into ``folder``; their tarballs lie or come in ``folder/packages``.

    Raises:
        click.ClickException: a package cannot be had or is not the pinned one.
    """
    packages = folder / "packages"
    things = things_of(read_labels(fetch(labels, packages)))
    found = [
        item for style, package in styles.items() for item in collect(style, package, fetch(package, packages), things)
    ]
    (folder / INDEX).unlink(missing_ok=True)
    shape = (len(found), SIDE, SIDE, 4)
    pictures = np.lib.format.open_memmap(folder / PICTURES, mode="w+", dtype=np.uint8, shape=shape)
    for row, (_, source) in enumerate(track(found, "Rendering")):
        pictures[row] = centre(render(source))
    pictures.flush()
    # The index comes last: with it, the pictures are whole.
    index = {
        "packages": [f"{package.name}@{package.version}" for package in (labels, *styles.values())],
        "labels": [drawing for drawing, _ in found],
        "words": [word for thing in things for word in (thing.name, *thing.tags)],
    }
    (folder / INDEX).write_text(json.dumps(index))


@click.command()
@folder_option
def main(folder: Path) -> None:
    """Fetch the drawings and render them to one array of 256x256 RGBA pictures."""
    prepare(folder, LABELS, {key: style.package for key, style in STYLES.items()})
    drawings = open_drawings(folder)
    counts = Counter(label.style for label in drawings.labels)
    styles = ", ".join(f"{count} in {STYLES[key].words} ({key})" for key, count in counts.items())
    Console().print(f"{len(drawings.labels)} pictures of {len(drawings.names)} things: {styles}", highlight=False)


if __name__ == "__main__":
    main()
