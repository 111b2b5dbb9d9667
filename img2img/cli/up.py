"""``img2img up`` and the hidden ``img2img demo``: the supervisor, with this process's signals."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from img2img.cli.generate import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from img2img.up import Supervisor, UpOptions

ENGINES: Final = ("auto", "diffusion", "cloudflare", "fake")
READY: Final = """
img2img is ready.

  REST         {url}/v1/jobs
  Cloudflare   {url}/client/v4     base URL for its SDKs; {whose}
  gRPC         127.0.0.1:{grpc_port}
  API docs     {url}/schema
  Data         {data_dir}
  Queue        {redis_url}     --redis-url of `img2img pools` and `img2img upstream`

Try it:

  curl {url}/client/v4/accounts/{account}/ai/run/@cf/runwayml/stable-diffusion-v1-5-img2img{key} \\
    -d '{{"prompt": "a lion"}}' --output picture.png

Ctrl-C stops it; its jobs are kept and go on the next time.
"""


def default_data_dir() -> Path:
    """Where the XDG base directories put a program's state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # Relative paths are to be ignored, says the specification.
    return (Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state") / "img2img"


engine_option = click.option(
    "--engine",
    type=click.Choice(ENGINES),
    envvar="IMG2IMG_ENGINE",
    show_envvar=True,
    default="auto",
    show_default=True,
    help="What makes the pictures; auto is diffusion, cloudflare calls Workers AI, fake needs no model.",
)


@click.command(
    short_help="Run the whole service on this machine.",
    epilog="\b\nExamples:\n"
    "  img2img up\n"
    "  img2img up --engine fake --http-port 8080\n"
    "  IMG2IMG_UPSTREAM_ACCOUNT=… IMG2IMG_UPSTREAM_TOKEN=… img2img up --engine cloudflare\n"
    "  img2img up --model ./my-model.safetensors --data-dir ./data\n"
    "  img2img up --pools pools.toml --workers 2",
)
@click.option(
    "--pools",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    envvar="IMG2IMG_POOLS_FILE",
    show_envvar=True,
    help="Several pools of workers (docs/pools.md), in place of --engine and --model.",
)
@engine_option
@click.option(
    "--model",
    metavar="M",
    envvar="IMG2IMG_MODEL",
    show_envvar=True,
    help="Folder, .safetensors file or hub id of an SD 1.x model; without it the small bundled one.",
)
@click.option(
    "--upstream",
    metavar="URL",
    envvar="IMG2IMG_UPSTREAM_URL",
    show_envvar=True,
    help="Where the engine cloudflare sends its calls.  [default: https://api.cloudflare.com/client/v4]",
)
@click.option(
    "--http-port",
    type=click.IntRange(0, 65535),
    envvar="IMG2IMG_HTTP_PORT",
    show_envvar=True,
    default=8000,
    show_default=True,
    help="Port for REST; 0 takes any free one.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    envvar="IMG2IMG_GRPC_PORT",
    show_envvar=True,
    default=50051,
    show_default=True,
    help="Port for gRPC; 0 takes any free one.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where jobs and pictures are kept.  [default: ~/.local/state/img2img]",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Worker processes, of each pool; each loads the model.",
)
@click.pass_context
def up(context: click.Context, /, data_dir: Path | None, **given: Any) -> None:
    """Run everything on this machine: queue server, gateway and workers.

    It listens on 127.0.0.1 only and needs no key. Ctrl-C stops it in order: running jobs get a few seconds to
    finish and go back to the queue otherwise. A second Ctrl-C stops it at once.
    """
    from img2img.up import UpOptions

    if given["pools"] is not None:
        _refuse_what_pools_decide(context)
    options = UpOptions(
        data_dir=(data_dir or default_data_dir()).absolute(),
        **given,
    )
    _run(options, _serve)


def _refuse_what_pools_decide(context: click.Context) -> None:
    """Raise ``UsageError`` if engine or model are on the command line; their variables are the workers' to check."""
    for name in ("engine", "model"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name} does not go with a pools file, which says the {name} of each pool: "
                f"leave out --{name}, or --pools (IMG2IMG_POOLS_FILE)"
            )


@click.command(hidden=True, epilog="\b\nExample:\n  img2img demo --engine fake")
@engine_option
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path("examples/dog.png"),
    show_default=True,
    help="The input picture.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("lion.png"),
    show_default=True,
    help="Where the new picture goes.",
)
def demo(engine: str, image: Path, output: Path) -> None:
    """Start the service, turn a dog into a lion through it, show where the time went, and stop."""
    import tempfile

    from img2img.demo import show_off
    from img2img.up import UpOptions

    async def body(supervisor: "Supervisor") -> None:
        await show_off(supervisor, image, output)

    with tempfile.TemporaryDirectory(prefix="img2img-demo-") as folder:
        options = UpOptions(data_dir=Path(folder), engine=engine, http_port=0, grpc_port=0, log_level="warning")
        if not _run(options, body):
            raise SystemExit(INTERRUPTED)


async def _serve(supervisor: "Supervisor") -> None:
    await supervisor.ready()
    click.echo(ready_text(supervisor))
    await supervisor.wait()


def ready_text(supervisor: "Supervisor") -> str:
    """What to do with the service now; the command in it works as it is pasted."""
    options = supervisor.options
    keys = supervisor.settings.tenants_file is not None
    return READY.format(
        url=options.http_url,
        grpc_port=options.grpc_port,
        data_dir=options.data_dir,
        redis_url=supervisor.redis_url,
        account="YOUR_ACCOUNT" if keys else "local",
        whose=f"keys as in {supervisor.settings.tenants_file}" if keys else 'account "local", any token or none',
        key=' -H "Authorization: Bearer $IMG2IMG_KEY"' if keys else "",
    )


def _run(options: "UpOptions", body: "Callable[[Supervisor], Awaitable[None]]") -> bool:
    """Run ``body`` in a supervisor; whether it returned before a signal stopped it. A second signal kills."""
    import asyncio

    from img2img.cli.report import ConsoleReport
    from img2img.up import ServiceFailed, Supervisor

    report = ConsoleReport()
    try:
        return asyncio.run(_supervise(Supervisor(options, report), body))
    except ServiceFailed as exc:
        raise click.ClickException(str(exc)) from exc
    finally:
        report.waiting("")


async def _supervise(supervisor: "Supervisor", body: "Callable[[Supervisor], Awaitable[None]]") -> bool:
    import asyncio
    import signal
    from contextlib import suppress

    async def run() -> None:
        async with supervisor:
            await body(supervisor)

    task = asyncio.create_task(run(), name="supervise")

    def stop() -> None:
        if supervisor.is_stopping:
            supervisor.kill()
        else:
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
            loop.add_signal_handler(number, stop)
    with suppress(asyncio.CancelledError):
        await task
        return True
    return False
