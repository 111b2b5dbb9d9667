"""``img2img jobs``: what the service has to do and has done for your account."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from img2img.cli.connection import connection_options, one_line_errors, take_connection
from img2img.cli.output import SUFFIXES, check_output, write_picture
from img2img.cli.times import clock, likely

if TYPE_CHECKING:
    from img2img.client import AttemptInfo, Client, Event, Failure, JobInfo, Receipt, UpstreamCall

STATES: Final = ("queued", "running", "succeeded", "failed", "canceled", "expired")
MAX_PAGE: Final = 100
MAX_EVENT: Final = 2**63 - 1
PROMPT_WIDTH: Final = 48
PIPE_WIDTH: Final = 160
SHOWN_DIGITS: Final = 16

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(epilog="\b\nExamples:\n  img2img jobs list --state running\n  img2img jobs watch 0-0199…")
def jobs() -> None:
    """Look at jobs, cancel them, and run them again."""


@jobs.command(
    "list",
    epilog="\b\nExamples:\n"
    "  img2img jobs list\n"
    "  img2img jobs list --state failed --limit 100\n"
    "  img2img jobs list --json | jq -r .id",
)
@click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="The newest so many.")
@json_option
@connection_options
def list_jobs(state: str | None, limit: int, as_json: bool, **given: Any) -> None:
    """List your jobs, newest first; with --json one object a line."""
    from img2img.client import JobState

    with one_line_errors(), take_connection(given).open() as client:
        found = _newest(client, JobState(state) if state else None, limit)
    if as_json:
        for job in found:
            click.echo(_json(job))
    else:
        _print_table(found)


@jobs.command(epilog="\b\nExample:\n  img2img jobs get 0-0199b3c4-… --json")
@click.argument("job_id")
@json_option
@connection_options
def get(job_id: str, as_json: bool, **given: Any) -> None:
    """Show one job."""
    with one_line_errors(), take_connection(given).open() as client:
        _print_job(client.get(job_id), as_json)


@jobs.command(
    epilog="\b\nExamples:\n"
    "  img2img jobs result 0-0199b3c4-…\n"
    "  img2img jobs result 0-0199b3c4-… -o lion.png\n"
    "  img2img jobs result 0-0199b3c4-… -o - > lion.png"
)
@click.argument("job_id")
@click.option(
    "--output", "-o", metavar="OUT", help="Where it goes; - is standard output.  [default: JOB_ID.png, or .webp, .jpg]"
)
@connection_options
def result(job_id: str, output: str | None, **given: Any) -> None:
    """Fetch the picture of a job that has succeeded."""
    if output is not None:
        check_output(output)
    with one_line_errors(), take_connection(given).open() as client:
        data = client.result(job_id)
        job = client.get(job_id)
    if job.result is None:
        raise click.ClickException(
            f"Job {job_id} is {job.state} again, after a replay: watch it with img2img jobs watch"
        )
    output = _place(job_id, output, job.result.media_type.removeprefix("image/"))
    write_picture(output, data)
    click.echo(f"{output}: {job.width}x{job.height}, {len(data):,} bytes", err=True)


@jobs.command(epilog="\b\nExample:\n  img2img jobs cancel 0-0199b3c4-…")
@click.argument("job_id")
@json_option
@connection_options
def cancel(job_id: str, as_json: bool, **given: Any) -> None:
    """Cancel a job, queued or running; one that has ended stays as it is."""
    with one_line_errors(), take_connection(given).open() as client:
        _print_job(client.cancel(job_id), as_json)


@jobs.command(
    epilog="\b\nExamples:\n"
    "  img2img jobs replay 0-0199b3c4-…\n"
    "  img2img jobs list --state failed --json | jq -r .id | xargs img2img jobs replay"
)
@click.argument("job_ids", nargs=-1, required=True, metavar="ID…")
@json_option
@connection_options
def replay(job_ids: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Run failed, canceled or expired jobs again, under their own ids.

    A job that waits or runs goes on as it is. Exit code 1 tells that some could not be replayed.
    """
    failed = False
    with one_line_errors(), take_connection(given).open() as client:
        for job_id in job_ids:
            try:
                with one_line_errors():
                    job = client.replay(job_id)
            except click.ClickException as exc:
                exc.show()
                failed = True
            else:
                click.echo(_json(job) if as_json else f"{job.id} {_state(job)}")
    sys.exit(failed)


@jobs.command(epilog="\b\nExamples:\n  img2img jobs watch 0-0199b3c4-…\n  img2img jobs watch 0-0199b3c4-… --json")
@click.argument("job_id")
@click.option("--after", type=click.IntRange(0, MAX_EVENT), default=0, help="Leave out the events up to this number.")
@json_option
@connection_options
def watch(job_id: str, after: int, as_json: bool, **given: Any) -> None:
    """Follow a job's events until it ends; Ctrl-C stops watching, not the job."""
    with one_line_errors(), take_connection(given).open() as client:
        for event in client.watch(job_id, after=after):
            click.echo(_json(event) if as_json else _event_line(event))


def _place(job_id: str, output: str | None, picture_format: str) -> str:
    """Where a job's picture goes.

    Raises:
        click.BadParameter: the file's name promises another format.
    """
    suffixes = [suffix for suffix, name in SUFFIXES.items() if name == picture_format]
    if output is None:
        return f"{job_id}{suffixes[0]}"
    promised = SUFFIXES.get(Path(output).suffix.lower(), picture_format)
    if promised != picture_format:
        raise click.BadParameter(
            f"the picture is {picture_format}: end {output} in {suffixes[0]}", param_hint="--output"
        )
    return output


def _newest(client: "Client", state: Any, limit: int) -> "list[JobInfo]":
    found: list[JobInfo] = []
    page = None
    while len(found) < limit:
        answer = client.list(state=state, limit=min(limit - len(found), MAX_PAGE), page=page)
        found += answer.jobs
        page = answer.next_page
        if page is None:
            break
    return found


def _json(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()


def _print_table(found: "list[JobInfo]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("ID", "State", "Created", "Took", "Prompt", box=None, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for job in found:
        # Text, because a prompt may hold what rich takes for markup.
        table.add_row(job.id, _state(job), clock(job.created_at), _took(job), Text(_prompt(job)))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(table if found else "No jobs.")


def _print_job(job: "JobInfo", as_json: bool) -> None:
    if as_json:
        click.echo(_json(job))
        return
    rows = {
        "id": job.id,
        "state": _state(job),
        "prompt": job.parameters.prompt,
        "seed": job.seed,
        "size": f"{job.width}x{job.height}" if job.width else "",
        "created": clock(job.created_at),
        "not before": clock(job.options.not_before) if job.options.not_before else "",
        "done": likely(job.eta) if job.eta else "",
        "took": _took(job),
        "attempt": job.attempt,
        "replays": job.replays or "",
        "pool": job.pool,
        "trace": job.trace_id or "",
        "executed by": job.executed_by,
        "timings": ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in job.timings.items()),
        "receipt": _receipt(job.result.receipt) if job.result and job.result.receipt else "",
        "upstream": _upstream(job.result.upstream) if job.result and job.result.upstream else "",
        "warnings": "; ".join(job.warnings),
        "error": _failure(job.error) if job.error else "",
    }
    for name, value in rows.items():
        if value != "":
            click.echo(f"{name:<12} {value}")
    for past in job.history:
        click.echo(f"{f'attempt {past.attempt}':<12} {_past_attempt(past)}")


def _receipt(receipt: "Receipt") -> str:
    """What made the picture, short: --json has all of it."""
    words = [
        f"pixels {receipt.pixels_sha256[:SHOWN_DIGITS]}",
        f"{receipt.model} {receipt.revision[:SHOWN_DIGITS]}".strip(),
        f"{receipt.steps} steps of {receipt.sampler}" if receipt.sampler else f"{receipt.steps} steps",
        f"{receipt.precision} on {receipt.device}" if receipt.precision else receipt.device,
    ]
    if receipt.rows is not None:
        words.append(f"reproducible, {receipt.rows} rows")
    return ", ".join(words)


def _upstream(call: "UpstreamCall") -> str:
    words = [f"call {call.request_id or 'without an id'}", f"account {call.account}"]
    if call.neurons is not None:
        words.append(f"{call.neurons:g} neurons")
    return ", ".join(words)


def _past_attempt(past: "AttemptInfo") -> str:
    took = (past.ended_at - past.started_at).total_seconds()
    return f"{clock(past.started_at)}, {took:.1f} s on {past.worker}: {_failure(past.error)}"


def _failure(error: "Failure") -> str:
    return f"{error.message} [{error.code}]"


def _state(job: "JobInfo") -> str:
    if job.queue_position is not None:
        return f"{job.state}, {job.queue_position} ahead"
    if job.steps and not job.state.is_terminal:
        return f"{job.state} {job.step}/{job.steps}"
    return job.state.value


def _took(job: "JobInfo") -> str:
    if job.finished_at is None:
        return ""
    return f"{(job.finished_at - job.created_at).total_seconds():.1f} s"


def _prompt(job: "JobInfo") -> str:
    text = " ".join(job.parameters.prompt.split())
    return text if len(text) <= PROMPT_WIDTH else text[: PROMPT_WIDTH - 1] + "…"


def _event_line(event: "Event") -> str:
    words = [f"{event.sequence:>4}", event.at.astimezone().strftime("%H:%M:%S.%f")[:-3], event.type]
    if event.stage:
        words.append(event.stage)
    if event.steps:
        words.append(f"{event.step}/{event.steps}")
    if event.error:
        words.append(_failure(event.error))
    if event.preview:
        shown = event.preview
        words.append(f"{shown.width}x{shown.height} {shown.media_type}, {len(shown.image):,} bytes")
    if event.replays:
        words.append(f"(replay {event.replays})")
    if event.moved:
        words.append(f"in {event.pool}, no longer in {event.moved.from_pool} [{event.moved.why}]")
    return " ".join(words)
