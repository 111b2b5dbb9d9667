"""The ``img2img`` command. Modules import what they need only when they run, so that help is quick."""

import click

from img2img.cli.generate import generate
from img2img.cli.jobs import jobs
from img2img.cli.keys import keys
from img2img.cli.pools import pools
from img2img.cli.serve import gateway, worker
from img2img.cli.up import demo, up
from img2img.cli.upstream import upstream
from img2img.cli.verify import verify
from img2img.errors import Img2ImgError


class OneLineErrors(click.Group):
    """Shows what the user can mend as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly then, as in `img2img jobs list | head -1`
        except (Img2ImgError, OSError) as exc:
            raise click.ClickException(str(exc)) from exc


@click.group(
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExamples:\n"
    "  img2img up                                     the whole service on this machine\n"
    '  img2img generate dog.png "a lion" -o lion.png  a picture from a picture\n'
    "  img2img jobs list                              what the service is doing",
)
@click.version_option(package_name="img2img")
def main() -> None:
    """Make pictures from pictures: run the service, or use one that runs."""


for command in (up, gateway, worker, generate, jobs, verify, pools, upstream, keys, demo):
    main.add_command(command)
