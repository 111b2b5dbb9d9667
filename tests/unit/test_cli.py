"""The command line itself: help, keys, and how options become settings."""

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

from img2img.cli import main
from img2img.cli.times import likely
from img2img.client import EtaInfo


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "img2img.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "IMG2IMG_METRICS_PORT": "0", **environment},
        timeout=60,
    )


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


@pytest.mark.parametrize(("path", "command"), [pytest.param(*pair, id=" ".join(pair[0])) for pair in commands(main)])
def test_every_help_has_examples(path: tuple[str, ...], command: click.Command) -> None:
    """Help shows commands to copy, and these begin with the command that it is about."""
    with click.Context(command, info_name="img2img") as context:
        shown = command.get_help(context)
    assert re.search(r"^  Examples?:$", shown, re.MULTILINE), shown
    assert " ".join(("img2img", *path)) in shown.partition("Example")[2]


def test_help_is_quick() -> None:
    """Help imports nothing that the service needs."""
    check = (
        "import sys; from img2img.cli import main; "
        "sys.exit(str({'grpc', 'httpx', 'rich', 'PIL', 'redis', 'opentelemetry'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stderr.strip() == "set()"


def test_a_new_key() -> None:
    """The key goes to the terminal once; the tenants file gets its hash only."""
    first, second = run("keys", "new", "acme"), run("keys", "new", "acme")
    key = first.stderr.split()[-1]
    assert key.startswith("i2i_")
    assert key not in second.stderr
    (tenant,) = tomllib.loads(first.stdout)["tenants"]
    assert tenant == {"account": "acme", "key_sha256": [hashlib.sha256(key.encode()).hexdigest()]}


def test_a_key_for_no_account() -> None:
    """An account that could not stand in a URL is refused."""
    ended = run("keys", "new", "a/b")
    assert ended.returncode == 2
    assert "letters, digits" in ended.stderr


def test_a_new_key_of_an_operator() -> None:
    """It goes into another table of the same file."""
    made = run("keys", "new", "--operator", "keda")
    (operator,) = tomllib.loads(made.stdout)["operators"]
    assert operator == {"name": "keda", "key_sha256": [hashlib.sha256(made.stderr.split()[-1].encode()).hexdigest()]}


@pytest.mark.parametrize("arguments", [(), ("acme", "--operator", "keda")])
def test_a_key_is_of_an_account_or_of_an_operator(arguments: tuple[str, ...]) -> None:
    ended = run("keys", "new", *arguments)
    assert ended.returncode == 2
    assert "Give either ACCOUNT or --operator NAME" in ended.stderr


def test_gateway_options_become_settings() -> None:
    """The gateway itself gets, checks and refuses what the option says."""
    ended = run("gateway", "--host", "0.0.0.0", IMG2IMG_KEY="the client's", IMG2IMG_SERVER="the client's")
    assert ended.returncode == 2
    assert "set IMG2IMG_TENANTS_FILE" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_worker_options_become_settings() -> None:
    """The worker reads the URL and the engine from its options, which win over the variables."""
    ended = run(
        *("worker", "--engine", "fake", "--redis-url", "nonsense"),
        IMG2IMG_ENGINE="nonsense",
        IMG2IMG_REDIS_URL="redis://127.0.0.1:1",
    )
    assert ended.returncode == 2
    assert "img2img worker: IMG2IMG_REDIS_URL: it must begin with redis://" in ended.stderr


def test_a_worker_takes_what_it_is_from_its_pool(tmp_path: Path) -> None:
    """An engine that the pools file contradicts is told in one line."""
    file = tmp_path / "pools.toml"
    file.write_text('[[pools]]\nname = "gpu"\nengine = "diffusion"\n[[routes]]\npools = ["gpu"]\n')
    ended = run("worker", "--pools-file", str(file), "--queue", "gpu", "--engine", "fake")
    assert ended.returncode == 2
    assert "img2img worker: IMG2IMG_ENGINE is 'fake', and the engine of pool 'gpu'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_that_calls_an_upstream_needs_an_account() -> None:
    ended = run("worker", "--engine", "cloudflare", "--upstream-url", "http://127.0.0.1:1/client/v4")
    assert ended.returncode == 2
    assert "set IMG2IMG_UPSTREAM_ACCOUNT and IMG2IMG_UPSTREAM_TOKEN" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0 s"), (40.4, "40 s"), (119, "119 s"), (150.5, "3 min"), (3599, "60 min"), (3 * 3600, "3 h")],
)
def test_times_to_completion_are_short(seconds: float, words: str) -> None:
    """No more digits than an estimate deserves; what has passed is now."""
    now = datetime.now(UTC)
    eta = EtaInfo(now + timedelta(seconds=seconds), now + timedelta(days=400))
    by = r"90 % by 2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"in about {words}, {by}", likely(eta, now))


@pytest.mark.parametrize("value", ["tomorrow", "2026-13-01", "0001-01-01T00:00:00+14:00"])
def test_a_wrong_time_is_usage(value: str) -> None:
    """The message shows how to write one."""
    ended = run("generate", "x", "--not-before", value, "--server", "127.0.0.1:1")
    assert ended.returncode == 2
    assert "write 2026-12-31T18:00" in ended.stderr


def test_an_unknown_option_is_usage() -> None:
    """A wrong command line is exit code 2 and shows where help is."""
    ended = run("up", "--enigne", "fake")
    assert ended.returncode == 2
    assert "--engine" in ended.stderr


def test_a_wrong_variable_of_up_is_named() -> None:
    result = run("up", IMG2IMG_HTTP_PORT="eighty")
    assert result.returncode == 2
    assert "IMG2IMG_HTTP_PORT" in result.stderr
