"""``img2img up --pools``: one gateway, and workers of every pool of the file."""

import json
import re
from pathlib import Path

import pytest

from img2img.client import Client
from tests.up.running import Up, run
from tests.upstream.api import Api
from tests.upstream.running import running_upstream

ACCOUNT = {"IMG2IMG_UPSTREAM_ACCOUNT": "acme", "IMG2IMG_UPSTREAM_TOKEN": "secret"}
PRICES = "step_price = 0.001\ntenant_spend_per_day = 5.0"
PNG = b"\x89PNG"


def pools_file(folder: Path, **engines: str) -> Path:
    """A file with a pool for each name and its engine; jobs go to the first that can run them."""
    path = folder / "pools.toml"
    pools = [
        f'[[pools]]\nname = "{name}"\nengine = "{engine}"\n{PRICES if engine == "cloudflare" else ""}'
        for name, engine in engines.items()
    ]
    path.write_text("\n".join([*pools, "[[routes]]", f"pools = {list(engines)}"]))
    return path


def words_of(folder: Path, pools: Path) -> list[str]:
    """The command that serves these pools."""
    return ["up", "--pools", str(pools), "--data-dir", str(folder / "data"), "--http-port", "0", "--grpc-port", "0"]


def environments(up: Up) -> dict[str, dict[str, str]]:
    """Of each worker by its pool, what is in its environment for the service."""
    found = {}
    for pid, command in up.processes().items():
        if command.endswith("-m worker") and "tether" not in command:
            lines = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
            variables = dict(line.split("=", 1) for line in lines if line.startswith("IMG2IMG_"))
            found[variables["IMG2IMG_QUEUE"]] = variables
    return found


def test_every_pool_has_a_worker(tmp_path: Path) -> None:
    """It is ready with all of them, names each in the log, and tells the upstream to those alone that call it.

    The queue server that it names is the one to ask what they do.
    """
    pools = pools_file(tmp_path, cpu="fake", burst="cloudflare")
    with (
        running_upstream(Api({"acme": "secret"})) as upstream,
        Up(tmp_path / "data", "--upstream", upstream.url, pools=pools, **ACCOUNT) as up,
    ):
        for pool in ("cpu", "burst"):
            up.shows(f"worker {pool}| ")
        workers = environments(up)
        assert set(workers) == {"cpu", "burst"}
        assert workers["burst"].items() >= {"IMG2IMG_UPSTREAM_URL": upstream.url, **ACCOUNT}.items()
        assert not [name for name in workers["cpu"] if name.startswith("IMG2IMG_UPSTREAM_")]
        with Client(up.grpc) as client:
            picture = client.generate(prompt="a lion", timeout=60)
        assert picture.data.startswith(PNG)
        assert picture.job.executed_by.startswith("fake/")
        assert upstream.api.calls == []
        queue = re.search(r"Queue +(unix:\S+)", up.text)
        assert queue, up.text
        shown = run("pools", "--json", "--redis-url", queue[1], "--pools-file", str(pools))
        assert [json.loads(line)["workers"] for line in shown.stdout.splitlines()] == [1, 1], shown.stderr


def test_several_workers_of_each_pool(tmp_path: Path) -> None:
    with Up(tmp_path / "data", "--workers", "2", pools=pools_file(tmp_path, cpu="fake", gpu="fake")) as up:
        for name in ("cpu 1", "cpu 2", "gpu 1", "gpu 2"):
            up.shows(f"worker {name}| ")


def test_a_pool_without_an_account_ends_it(tmp_path: Path) -> None:
    """A worker that cannot be configured is named with its own words, and nothing is left running."""
    ended = run(*words_of(tmp_path, pools_file(tmp_path, cpu="fake", burst="cloudflare")))
    assert ended.returncode == 1
    assert "worker burst ended (exit status 2)" in ended.stderr
    assert "set IMG2IMG_UPSTREAM_ACCOUNT and IMG2IMG_UPSTREAM_TOKEN" in ended.stderr


@pytest.mark.parametrize(("option", "value"), [("engine", "fake"), ("model", "mine.safetensors")])
def test_the_file_says_engine_and_model(tmp_path: Path, option: str, value: str) -> None:
    """Neither goes with it on the command line."""
    ended = run(*words_of(tmp_path, pools_file(tmp_path, cpu="fake")), f"--{option}", value)
    assert ended.returncode == 2
    assert f"--{option} does not go with a pools file, which says the {option} of each pool" in ended.stderr


def test_a_variable_that_contradicts_the_file(tmp_path: Path) -> None:
    """The worker that it is wrong for refuses it."""
    ended = run(*words_of(tmp_path, pools_file(tmp_path, cpu="fake")), IMG2IMG_ENGINE="diffusion")
    assert ended.returncode == 1
    assert "IMG2IMG_ENGINE is 'diffusion', and the engine of pool 'cpu'" in ended.stderr


def test_a_file_that_is_wrong_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    pools = pools_file(tmp_path, cpu="fake")
    pools.write_text(pools.read_text().replace("pools = ['cpu']", "pools = ['gpu']"))
    ended = run(*words_of(tmp_path, pools))
    assert ended.returncode == 1
    assert f"{pools}: route 1 names the pool 'gpu', which is not in the file" in ended.stderr
    assert not (tmp_path / "data" / "valkey.log").exists()
