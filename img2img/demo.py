"""What ``make demo`` shows: the sample dog becomes a lion, over Cloudflare's route and real HTTP."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
import httpx

from img2img.schema import MODEL
from img2img.up import Supervisor

JOB_HEADER: Final = "img2img-job-id"
PROMPT: Final = "Change to a lion"
LIMIT: Final = 120.0
BAR_WIDTH: Final = 40


async def show_off(supervisor: Supervisor, image: Path, output: Path) -> None:
    """Send ``image`` through the running service, write ``output``, and tell where the time went.

    Raises:
        ClickException: the service refused it, or it all took absurdly long.
    """
    started = time.monotonic()
    try:
        async with asyncio.timeout(LIMIT):
            await supervisor.ready()
            click.echo(f"Everything is up after {time.monotonic() - started:.1f} s.")
            await _send(supervisor.options.http_url, image, output)
    except TimeoutError as exc:
        raise click.ClickException(f"Not done within {LIMIT:.0f} s: see the lines above for why") from exc


async def _send(base_url: str, image: Path, output: Path) -> None:
    picture = await asyncio.to_thread(image.read_bytes)
    # As the curl of Cloudflare's model page has it: the file's bytes as a JSON array of integers.
    body = {
        "prompt": PROMPT,
        "image": list(picture),
        "strength": 0.9,
        "guidance": 3.5,
        "seed": 1,
    }
    path = f"/client/v4/accounts/local/ai/run/{MODEL}"
    # trust_env: a proxy in the environment is not for our own loopback.
    async with httpx.AsyncClient(base_url=base_url, timeout=LIMIT, trust_env=False) as http:
        started = time.monotonic()
        answer = await http.post(path, json=body)
        seconds = time.monotonic() - started
        if answer.status_code != httpx.codes.OK:
            raise click.ClickException(f"POST {path} answered {answer.status_code}: {answer.text}")
        await asyncio.to_thread(output.write_bytes, answer.content)
        job = (await http.get(f"/v1/jobs/{answer.headers[JOB_HEADER]}")).raise_for_status().json()
    click.echo(f"POST {path}")
    click.echo(f'  {image}, "{PROMPT}", strength 0.9, guidance 3.5, seed 1')
    click.echo(f"  {answer.headers['content-type']}, {len(answer.content):,} bytes, {seconds:.2f} s -> {output}")
    click.echo(breakdown(job))


def breakdown(job: Mapping[str, Any]) -> str:
    """A job's timings as a bar chart in text."""
    timings: dict[str, float] = job["timings"]
    whole = sum(timings.values())
    lines = [f"\nWhere the {whole:.2f} s of job {job['id']} went:"]
    for stage, seconds in timings.items():
        bar = "█" * round(BAR_WIDTH * seconds / whole) if whole else ""
        lines.append(f"  {stage.replace('_', ' '):<14}{seconds:8.3f} s  {bar}")
    return "\n".join(lines)
