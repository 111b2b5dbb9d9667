"""``img2img verify``: makes a job's picture again and tells whether it is the same."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from img2img.cli.connection import Connection, connection_options, one_line_errors, take_connection
from img2img.cli.generate import picture_file, run_job
from img2img.cli.jobs import PIPE_WIDTH, SHOWN_DIGITS, json_option

if TYPE_CHECKING:
    from img2img.client import Comparison

SAME: Final = 0
DIFFERENT: Final = 1


class NoAnswer(click.ClickException):
    """What keeps a comparison from being made; 1 is for pictures that differ."""

    exit_code = 2


@click.command(
    short_help="Make a job's picture again, and compare.",
    epilog="\b\nExamples:\n"
    "  img2img verify 0-0199b3c4-…\n"
    "  img2img verify 0-0199b3c4-… --image dog.png --mask head.png\n"
    "  img2img verify 0-0199b3c4-… --json | jq .same_pixels",
)
@click.argument("job_id")
@click.option("--image", type=picture_file, help="The job's input picture, which the service does not keep.")
@click.option("--mask", type=picture_file, help="Its mask.")
@json_option
@connection_options
def verify(job_id: str, image: Path | None, mask: Path | None, as_json: bool, **given: Any) -> None:
    """Make the picture of a job again and compare the two, with the receipts of what made them.

    The job must have been made with `--reproducible` (the option `reproducible`). Exit code 0 says that the pixels are
    the same, 1 that they differ, 2 that it could not be told.
    """
    connection = take_connection(given)
    try:
        again, comparison = _repeat(connection, job_id, image, mask)
    except click.ClickException as exc:
        raise NoAnswer(exc.message) from exc
    if as_json:
        click.echo(_json(job_id, again, comparison))
    else:
        _print(job_id, again, comparison)
    sys.exit(SAME if comparison.same_pixels else DIFFERENT)


def _repeat(connection: Connection, job_id: str, image: Path | None, mask: Path | None) -> "tuple[str, Comparison]":
    """The second job's id, and how the two compare."""
    from img2img.client import compare, repetition

    with one_line_errors():
        with connection.open() as client:
            job = client.get(job_id)
        again = run_job(connection, dict(repetition(job, image, mask))).job
        return again.id, compare(job, again)


def _json(job_id: str, again: str, comparison: "Comparison") -> str:
    import msgspec

    return msgspec.json.encode(
        {
            "job": job_id,
            "again": again,
            "same_pixels": comparison.same_pixels,
            "same_file": comparison.same_file,
            "causes": comparison.causes,
            "facts": [msgspec.structs.asdict(fact) | {"same": fact.same} for fact in comparison.facts],
        }
    ).decode()


def _print(job_id: str, again: str, comparison: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "Job", "Again", "", box=None, pad_edge=False)
    for fact in comparison.facts:
        is_digest = "sha256" in fact.name or fact.name.startswith("weights.")
        shown = (value[:SHOWN_DIGITS] if is_digest else value for value in (fact.job, fact.again))
        table.add_row(fact.name, *shown, "same" if fact.same else "differs")
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False).print(table)
    click.echo(f"{verdict(comparison)} (job {job_id}, again {again})")


def verdict(comparison: "Comparison") -> str:
    """What the comparison comes to, in one line."""
    if comparison.same_pixels:
        return "The pixels are the same." if comparison.same_file else "The pixels are the same; the files differ."
    if comparison.causes:
        return f"The pixels differ; so do {', '.join(comparison.causes)}, which explains it."
    return "The pixels differ, and nothing explains it: the same things made both pictures."
