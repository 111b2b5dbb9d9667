"""``img2img generate``: one picture, with its progress on the terminal."""

import asyncio
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from img2img.cli.connection import Connection, connection_options, one_line_errors, take_connection
from img2img.cli.output import STANDARD_OUTPUT, check_file, check_output, format_of, write_picture, write_whole
from img2img.cli.times import clock, likely

if TYPE_CHECKING:
    from rich.progress import Progress

    from img2img.client import AsyncClient, Event, JobInfo, Picture

SAMPLERS: Final = ("dpmpp_2m", "ddim", "euler", "euler_a")
FORMATS: Final = ("png", "webp", "jpeg")
POSITION_SECONDS: Final = 1.0
WORTH_TELLING: Final = 0.005
CANCELING: Final = "canceling (Ctrl-C again: at once)"
INTERRUPTED: Final = 130  # what a shell reports for a program that Ctrl-C ended
OPTIONS: Final = {
    "deadline": "deadline_seconds",
    "priority": "priority",
    "sampler": "sampler",
    "not_before": "not_before",
    "reproducible": "reproducible",
    "previews": "previews",
    "model": "model",
}
FIELDS: Final = {
    "strength": "strength",
    "steps": "num_steps",
    "guidance": "guidance",
    "seed": "seed",
    "negative_prompt": "negative_prompt",
    "mask": "mask",
    "width": "width",
    "height": "height",
}


class Stopped(Exception):
    """Ctrl-C came, and the job is canceled."""


class Time(click.ParamType[datetime]):
    """A time as ISO 8601 and RFC 3339 write it; one without an offset is this machine's."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            return datetime.fromisoformat(value).astimezone()
        except (ValueError, OverflowError) as exc:
            self.fail(f"{value!r} is not a time: {exc}; write 2026-12-31T18:00 or 2026-12-31T18:00:00Z", param, ctx)


picture_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    short_help="Make a picture with a running service.",
    epilog="\b\nExamples:\n"
    '  img2img generate dog.png "a lion" -o lion.png --strength 0.9 --seed 1\n'
    '  img2img generate "a lion" -o lion.webp              from the prompt alone\n'
    '  img2img generate dog.png "a hat" --mask head.png    only the white part of the mask is drawn anew\n'
    '  cat dog.png | img2img generate - "a lion" -o - > lion.png',
)
@click.argument("words", nargs=-1, required=True, metavar="[IMAGE] PROMPT")
@click.option(
    "--output",
    "-o",
    metavar="OUT",
    default="picture.png",
    show_default=True,
    help="Where the picture goes; - is standard output. The suffix .png, .webp or .jpg decides the format.",
)
@click.option("--strength", type=float, help="0 to 1; lower stays closer to IMAGE.  [default: 1]")
@click.option("--steps", type=int, help="1 to 20.  [default: 20]")
@click.option("--guidance", type=float, help="0 to 50; higher follows PROMPT more closely.  [default: 7.5]")
@click.option("--seed", type=int, help="The same seed makes the same picture, up to rounding; drawn when not given.")
@click.option("--negative-prompt", metavar="TEXT", help="What to avoid.")
@click.option("--mask", type=picture_file, help="Which part of IMAGE to draw anew: its white one.")
@click.option("--width", type=int, help="256 to 2048 pixels; without it what suits the model and IMAGE.")
@click.option("--height", type=int, help="256 to 2048 pixels.")
@click.option("--sampler", type=click.Choice(SAMPLERS), help="Without it the model's own.")
@click.option("--format", "output_format", type=click.Choice(FORMATS), help="Wins over OUT's suffix.")
@click.option("--deadline", type=float, metavar="SECONDS", help="Give up when not done by then.")
@click.option(
    "--not-before", type=Time(), metavar="TIME", help="Start no sooner, as 2026-12-31T18:00 (here) or …T18:00Z."
)
@click.option("--reproducible", is_flag=True, help="The same bytes again for the same seed: see img2img verify.")
@click.option(
    "--model", metavar="NAME", help="A model that the service has routes for; without it the service's choice."
)
@click.option("--priority", type=int, help="-10 to 10; higher goes first.  [default: 0]")
@click.option(
    "--preview-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Meanwhile, write small pictures of how far it is to FILE, as WebP, each in place of the one before.",
)
@connection_options
def generate(
    words: tuple[str, ...], output: str, output_format: str | None, preview_file: Path | None, **given: Any
) -> None:
    """Make a picture from PROMPT, starting from IMAGE if there is one (- reads standard input).

    Needs a running service; `img2img up` starts one. Ctrl-C cancels the job.
    """
    connection = take_connection(given)
    fields = request_fields(words, given)
    output_format = output_format or format_of(output)
    fields["options"] = job_options({**given, "output_format": output_format, "previews": preview_file is not None})
    check_output(output)
    if preview_file is not None:
        check_file(preview_file, "--preview-file")
    picture = run_job(connection, fields, preview_file)
    write_picture(output, picture.data)
    click.echo(summary(output, picture), err=True)


def run_job(connection: Connection, fields: dict[str, Any], preview_file: Path | None = None) -> "Picture":
    """Make a picture and show how it goes on; Ctrl-C cancels its job and ends the program."""
    try:
        with one_line_errors():
            return asyncio.run(make(connection, fields, preview_file))
    except Stopped:
        click.echo("Stopped: the job is canceled.", err=True)
    except KeyboardInterrupt:
        click.echo("Stopped at once: a job that was created already may go on, see `img2img jobs list`.", err=True)
    raise SystemExit(INTERRUPTED)


def request_fields(words: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The request's fields from the command's arguments."""
    if len(words) > 2:
        raise click.UsageError('Give at most IMAGE and PROMPT; put a prompt of several words in quotes: "a lion"')
    *image, prompt = words
    fields: dict[str, Any] = {name: given[option] for option, name in FIELDS.items()}
    fields["prompt"] = prompt
    if image == ["-"]:
        fields["image"] = sys.stdin.buffer.read()
    elif image:
        path = Path(image[0])
        if not path.is_file():
            raise click.BadParameter(f"there is no file {image[0]}", param_hint="IMAGE")
        fields["image"] = path
    elif Path(prompt).suffix and Path(prompt).is_file():
        raise click.UsageError(f'{prompt} is a file: give a prompt after it, as in {prompt} "a lion"')
    return fields


def job_options(given: dict[str, Any]) -> Any:
    from img2img.client import JobOptions, OutputFormat, Sampler

    values = {name: given[option] for option, name in OPTIONS.items() if given[option] is not None}
    if "sampler" in values:
        values["sampler"] = Sampler(values["sampler"])
    if given["output_format"]:
        values["output_format"] = OutputFormat(given["output_format"])
    return JobOptions(**values)


async def make(connection: Connection, fields: dict[str, Any], preview_file: Path | None) -> "Picture":
    """Create the job, show how it goes on, and fetch the picture; being cancelled cancels the job.

    Raises:
        Stopped: it was cancelled, and so is the job.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from img2img.client import JobState, Picture

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    async with connection.open_async() as client:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            bar.add_task("sending", total=None)
            job = await _create(client, fields, bar)
            try:
                await _follow(client, job.id, bar, preview_file)
            except asyncio.CancelledError:
                bar.update(bar.task_ids[0], description=CANCELING)
                await client.cancel(job.id)
                raise Stopped from None
        job = await client.get(job.id)
        if job.state is not JobState.SUCCEEDED:
            raise click.ClickException(failure(job))
        return Picture(job, await client.result(job.id))


async def _create(client: "AsyncClient", fields: dict[str, Any], bar: "Progress") -> "JobInfo":
    """Create the job; when cancelled meanwhile, cancel what may have been created already."""
    creating = asyncio.create_task(client.create(**fields), name="create")
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError:
        bar.update(bar.task_ids[0], description=CANCELING)
        await client.cancel((await creating).id)
        raise Stopped from None


async def _follow(client: "AsyncClient", job_id: str, bar: "Progress", preview_file: Path | None) -> None:
    """Show the place in the queue and then the steps, until the job has ended; previews go to their file."""
    task = bar.task_ids[0]
    bar.update(task, description="queued")
    waiting = asyncio.create_task(_show_position(client, job_id, bar), name="show the queue position")
    try:
        async for event in client.watch(job_id):
            if event.type != "queued":
                waiting.cancel()
            if event.type != "preview":
                bar.update(task, **progress(event))
            elif preview_file is not None and event.preview is not None:
                write_whole(preview_file, event.preview.image)
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting


async def _show_position(client: "AsyncClient", job_id: str, bar: "Progress") -> None:
    """The event log does not tell when others leave the queue, so ask."""
    from img2img.client import ClientError

    while True:
        with suppress(ClientError):  # the event stream will tell, if it lasts
            bar.update(bar.task_ids[0], description=waiting_for(await client.get(job_id)))
        await asyncio.sleep(POSITION_SECONDS)


def waiting_for(job: "JobInfo") -> str:
    """Why a queued job does not run yet, and when it will be done."""
    words = ["queued"]
    if job.queue_position is not None:
        words.append(f"{job.queue_position} ahead")
    elif job.options.not_before is not None:
        words.append(f"not before {clock(job.options.not_before)}")
    if job.eta is not None:
        words.append(f"done {likely(job.eta)}")
    return ", ".join(words)


def progress(event: "Event") -> dict[str, Any]:
    """What the bar shows after ``event``."""
    if event.steps:
        described = f"{event.stage or 'step'} {event.step}/{event.steps}"
        return {"description": described, "completed": event.step, "total": event.steps}
    return {"description": (event.stage or event.type).replace("_", " ")}


def failure(job: "JobInfo") -> str:
    """Why there is no picture, in one line."""
    if job.error is None:
        return f"Job {job.id} is {job.state}"
    return f"Job {job.id} {job.state}: {job.error.message} [{job.error.code}]"


def summary(output: str, picture: "Picture") -> str:
    """What was made and where the time went."""
    job = picture.job
    lines = [f"Warning: {warning}" for warning in job.warnings]
    seconds = sum(job.timings.values())
    stages = ", ".join(
        f"{stage.replace('_', ' ')} {value:.2f}" for stage, value in job.timings.items() if value >= WORTH_TELLING
    )
    size = f"{job.width}x{job.height}, {len(picture.data):,} bytes"
    name = "picture" if output == STANDARD_OUTPUT else output
    lines.append(f"{name}: {size}, seed {job.seed}, {seconds:.2f} s ({stages}), job {job.id}")
    return "\n".join(lines)
