"""Draw a sheet of what a checkpoint makes of things and styles, and count how often it is what was asked for.

    python -m models.evaluate worker/models/emoji-sd [--things 36] [--styles twemoji]

Every thing is drawn once from its name alone and once from the picture of a dog. The number is retrieval: a picture
counts as right if of all drawings in its style (about a thousand) the most like it is that of its thing. A model that
remembers its drawings scores high; one that draws a good lion of another kind does not. Compare scores only between
checkpoints, with the same options.
"""

import json
from pathlib import Path
from typing import Final, NamedTuple

import click
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.drawings import Drawing, Drawings, open_drawings
from models.options import folder_option, seed_option, styles_option, things_option
from models.painter import BATCH, DOG, Manner, Painter
from models.retrieval import Gallery, share_within
from models.sources import STYLES

FROM_NAME: Final = "from the name"
FROM_DOG: Final = "from the dog"
MANNERS: Final = {FROM_NAME: Manner(guidance=7.5), FROM_DOG: Manner(guidance=3.5, strength=0.9)}
"""The schema's default guidance, and what the README's lion is made with."""
LIMITS: Final = (1, 5)
CELL, LABEL = 128, 18
COLUMNS: Final = 12


class Painted(NamedTuple):
    """A picture, what it should show, and its rank in the gallery of its style."""

    label: Drawing
    picture: Image.Image
    rank: int


def paint_all(painter: Painter, drawings: Drawings, labels: list[Drawing], seed: int) -> dict[str, list[Painted]]:
    """Every label once in each of the manners, ranked among all ``drawings``."""
    galleries = {style: Gallery(drawings, style) for style in dict.fromkeys(label.style for label in labels)}
    dog = Image.open(DOG).convert("RGB")
    painted: dict[str, list[Painted]] = {}
    for title, manner in MANNERS.items():
        painted[title] = []
        for first in track(range(0, len(labels), BATCH), f"Drawing {title}"):
            batch = labels[first : first + BATCH]
            prompts = [f"{label.name}, {STYLES[label.style].words}" for label in batch]
            picture = dog if title == FROM_DOG else None
            for label, image in zip(batch, painter.paint(prompts, manner._replace(seed=seed), picture), strict=True):
                painted[title].append(Painted(label, image, galleries[label.style].rank(image, label.name)))
    return painted


def draw_sheet(painted: dict[str, list[Painted]], strip: Image.Image) -> Image.Image:
    """The dog's strip, then one block for each manner, with names and ranks below the pictures."""
    rows = [-(-len(block) // COLUMNS) for block in painted.values()]
    height = strip.height + sum(LABEL + count * (CELL + LABEL) for count in rows)
    sheet = Image.new("RGB", (max(COLUMNS * CELL, strip.width), height), "white")
    sheet.paste(strip, (0, 0))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    top = strip.height
    for (title, block), count in zip(painted.items(), rows, strict=True):
        pen.text((4, top + 2), _headline(title), "black", font)
        for place, (label, picture, rank) in enumerate(block):
            x, y = place % COLUMNS * CELL, top + LABEL + place // COLUMNS * (CELL + LABEL)
            sheet.paste(picture.resize((CELL, CELL)), (x, y))
            colour = "green" if rank == 1 else "black" if rank <= LIMITS[-1] else "red"
            pen.text((x + 4, y + CELL + 1), f"{label.name[:16]}: {rank}", colour, font)
        top += LABEL + count * (CELL + LABEL)
    return sheet


def _headline(title: str) -> str:
    manner = MANNERS[title]
    return f"{title}: {manner.steps} steps, guidance {manner.guidance}, strength {manner.strength}"


def scores_of(painted: dict[str, list[Painted]]) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 accuracy by manner and style, each of 0 to 1."""
    scores = {}
    for title, block in painted.items():
        for style in dict.fromkeys(item.label.style for item in block):
            ranks = [item.rank for item in block if item.label.style == style]
            scores[f"{title}, {style}"] = {f"top-{limit}": share_within(ranks, limit) for limit in LIMITS}
    return scores


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@folder_option
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where sheet.png and scores.json go.  [default: evaluation/NAME in the folder]",
)
@things_option("36")
@styles_option("twemoji")
@seed_option
def main(
    checkpoint: Path, folder: Path, output: Path | None, things: int | None, styles: tuple[str, ...], seed: int
) -> None:
    """Draw a sheet of what CHECKPOINT makes of things and styles, and count how often it is what was asked for."""
    output = output or folder / "evaluation" / checkpoint.resolve().name
    drawings = open_drawings(folder)
    chosen = drawings.choose(things, styles)
    painter = Painter(checkpoint)
    painted = paint_all(painter, drawings, chosen.labels, seed)
    scores = scores_of(painted)
    output.mkdir(parents=True, exist_ok=True)
    draw_sheet(painted, painter.paint_examples("lion", seed)).save(output / "sheet.png")
    ranks = {title: [[*item.label, item.rank] for item in block] for title, block in painted.items()}
    (output / "scores.json").write_text(json.dumps({"scores": scores, "ranks": ranks}, indent=1))
    table = Table("drawn", *(f"top-{limit}" for limit in LIMITS), title=f"{checkpoint}, {len(chosen.names)} things")
    for title, shares in scores.items():
        table.add_row(title, *(f"{share:.0%}" for share in shares.values()))
    Console().print(table, f"{output / 'sheet.png'}")


if __name__ == "__main__":
    main()
