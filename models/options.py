"""Options that several of the commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from models.sources import STYLES

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER: Final = Path("build/emoji")

folder_option = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=FOLDER,
    show_default=True,
    help="Where packages, drawings and what is made of them lie.",
)


class Things(click.ParamType[int | None]):
    """A number of things, or ``all``, which is None."""

    name = "number|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "all":
            return None
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is no number of things: write 36, or all", param, ctx)
        return int(value)


class Styles(click.ParamType[tuple[str, ...]]):
    """Styles with commas between, or ``all``."""

    name = "styles"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        keys = tuple(STYLES) if value == "all" else tuple(str(value).split(","))
        if unknown := [key for key in keys if key not in STYLES]:
            self.fail(f"{unknown[0]!r} is no style: take of {', '.join(STYLES)}, with commas, or all", param, ctx)
        return keys


def things_option(default: str) -> Callable[[Command], Command]:
    """``--things``, the best known first."""
    return click.option(
        "--things", type=Things(), default=default, show_default=True, help="How many things, the best known first."
    )


def styles_option(default: str) -> Callable[[Command], Command]:
    """``--styles``."""
    return click.option(
        "--styles",
        type=Styles(),
        default=default,
        show_default=True,
        help=f"Styles with commas between, of {', '.join(STYLES)}; or all.",
    )


seed_option = click.option("--seed", type=int, default=1, show_default=True, help="Of all that is drawn by chance.")
steps_option = click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Steps instead of minutes; on the same CPU the same steps from the same seed give the same weights.",
)


def minutes_option(default: float) -> Callable[[Command], Command]:
    """``--minutes``."""
    return click.option(
        "--minutes",
        type=click.FloatRange(min=0, min_open=True),
        default=default,
        show_default=True,
        help="How long to train, all sittings together: a run that was stopped goes on where it last saved.",
    )
