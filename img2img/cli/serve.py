"""``img2img gateway`` and ``img2img worker``: ``python -m gateway`` with options for the main settings."""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import click

from img2img.cli.connection import Command
from img2img.cli.up import ENGINES

# A module of each extra that nothing else brings along.
EXTRAS: Final = {"gateway": "litestar", "worker": "uvloop"}


def setting(name: str, **options: Any) -> Callable[[Command], Command]:
    """An option that stands for the variable ``IMG2IMG_<NAME>`` and, when not given, leaves it alone."""
    variable = "IMG2IMG_" + name.removeprefix("--").replace("-", "_").upper()
    options["help"] = f"{options['help']}  [{variable}]"
    return click.option(name, **options)


def become(program: str, given: dict[str, Any]) -> None:
    """Replace this process by ``python -m program``; it reads and checks the variables itself."""
    if find_spec(EXTRAS[program]) is None:
        raise click.ClickException(f"The {program} needs packages that are missing: pip install 'img2img[{program}]'")
    options = {f"IMG2IMG_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    # -P: a folder of the same name where the command is typed must not be taken for ours.
    command = [sys.executable, "-P", "-m", program]
    os.execve(command[0], command, os.environ | options)  # noqa: S606 - no shell is the point


redis_url = setting("--redis-url", metavar="URL", help="The Redis or Valkey server, redis://… or unix://…")
queue = setting("--queue", metavar="NAME", help="The queue's name; gateway and workers of a pool share it.")
pools_file = setting("--pools-file", metavar="FILE", help="Several pools of workers; see docs/pools.md.")
log_level = setting("--log-level", metavar="LEVEL", help="debug, info, warning or error.")


@click.command(
    short_help="Run the front ends only.",
    epilog="\b\nExamples:\n"
    "  img2img gateway --redis-url redis://queue:6379/0 --host 0.0.0.0 --tenants-file tenants.toml\n"
    "  IMG2IMG_REDIS_URL=redis://queue:6379/0 img2img gateway",
)
@redis_url
@queue
@pools_file
@setting("--host", metavar="ADDRESS", help="Where to listen; other than loopback it needs a tenants file.")
@setting("--http-port", type=click.IntRange(0, 65535), help="Port for REST.")
@setting("--grpc-port", type=click.IntRange(0, 65535), help="Port for gRPC.")
@setting("--tenants-file", metavar="FILE", help="Who may use the service; see `img2img keys new --help`.")
@setting("--tls-cert", metavar="FILE", help="Certificate chain (PEM).")
@setting("--tls-key", metavar="FILE", help="Private key (PEM).")
@log_level
def gateway(**given: Any) -> None:
    """Run the front ends: REST, the Cloudflare dialect and gRPC.

    An option that is not given comes from the variable beside it; docs/settings.md lists all variables.
    """
    become("gateway", given)


@click.command(
    short_help="Run a worker only.",
    epilog="\b\nExamples:\n"
    "  img2img worker --redis-url redis://queue:6379/0 --model stable-diffusion-v1-5/stable-diffusion-v1-5\n"
    "  IMG2IMG_REDIS_URL=redis://queue:6379/0 img2img worker --engine fake --concurrency 4\n"
    "  img2img worker --redis-url redis://queue:6379/0 --pools-file pools.toml --queue burst",
)
@redis_url
@queue
@pools_file
@setting("--engine", type=click.Choice(ENGINES), help="What makes the pictures.")
@setting("--model", metavar="M", help="Folder, .safetensors file or hub id of an SD 1.x model.")
@setting("--upstream-url", metavar="URL", help="Where the engine cloudflare sends its calls.")
@setting("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps …")
@setting("--concurrency", type=click.IntRange(1), help="Jobs at a time.")
@log_level
def worker(**given: Any) -> None:
    """Run a worker: it takes jobs from the queue and makes the pictures.

    An option that is not given comes from the variable beside it; docs/settings.md lists all variables.
    """
    become("worker", given)
