"""The commands that use a running service: ``generate`` and ``jobs``."""

import io
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.stack import DOG, eventually
from tests.up.running import IMG2IMG, Terminal, Up, kill, run


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A service whose steps take a fifth of a second each."""
    with Up(tmp_path_factory.mktemp("up"), IMG2IMG_FAKE_STEP_SECONDS="0.2") as running:
        yield running


@pytest.fixture
def server(up: Up) -> str:
    return up.grpc


def look(data: bytes) -> tuple[str | None, tuple[int, int]]:
    """A picture's format and size."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.format, picture.size


def jobs(server: str, *arguments: str) -> list[dict[str, Any]]:
    ended = run("jobs", *arguments, "--json", IMG2IMG_SERVER=server)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_a_picture_from_a_picture(server: str, tmp_path: Path) -> None:
    """On a terminal it shows the steps, writes the format that the file's name asks for, and sums up."""
    out = tmp_path / "lion.webp"
    words = ("generate", str(DOG), "a lion", "-o", str(out), "--steps", "3", "--seed", "7", "--strength", "1")
    with Terminal(*words, IMG2IMG_SERVER=server) as terminal:
        assert terminal.wait() == 0, terminal.text
    assert re.search(r"steps [123]/3", terminal.text), terminal.text
    summary = re.search(r"lion\.webp: 256x256, [\d,]+ bytes, seed 7, ([\d.]+) s \(.*steps 0\.\d+.*\)", terminal.text)
    assert summary, terminal.text
    assert float(summary[1]) > 0.6
    assert look(out.read_bytes()) == ("WEBP", (256, 256))


def test_a_picture_through_pipes(server: str) -> None:
    """``-`` reads the picture from standard input and writes the new one to standard output, and only that."""
    ended = subprocess.run(
        [*IMG2IMG, "generate", "-", "a lion", "-o", "-", "--steps", "1", "--format", "jpeg"],
        input=DOG.read_bytes(),
        capture_output=True,
        env={**os.environ, "IMG2IMG_SERVER": server},
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert look(ended.stdout) == ("JPEG", (256, 256))


def test_a_picture_from_the_prompt_alone(server: str, tmp_path: Path) -> None:
    """One argument is the prompt; the options arrive in the job."""
    ended = run(
        *("generate", "a lion", "-o", str(tmp_path / "a.png"), "--server", server, "--steps", "1"),
        *("--guidance", "3", "--negative-prompt", "a dog", "--width", "512", "--height", "256"),
        *("--sampler", "euler", "--priority", "2", "--deadline", "50"),
    )
    assert ended.returncode == 0, ended.stderr
    assert look((tmp_path / "a.png").read_bytes()) == ("PNG", (512, 256))
    job = jobs(server, "list", "--limit", "1")[0]
    parameters, options = job["parameters"], job["options"]
    assert (parameters["image"], parameters["negative_prompt"], parameters["guidance"]) == (None, "a dog", 3)
    assert options == {"priority": 2, "deadline_seconds": 50, "sampler": "euler"}


def test_the_picture_of_a_job(server: str, tmp_path: Path) -> None:
    """Whoever made it, ``jobs result`` fetches it: into a file with the suffix of its format, or through a pipe."""
    made = tmp_path / "lion.webp"
    assert run("generate", "a lion", "-o", str(made), "--steps", "1", IMG2IMG_SERVER=server).returncode == 0
    job_id = jobs(server, "list", "--limit", "1")[0]["id"]
    ended = run("jobs", "result", job_id, IMG2IMG_SERVER=server, cwd=tmp_path)
    assert (ended.returncode, (tmp_path / f"{job_id}.webp").read_bytes()) == (0, made.read_bytes())
    assert f"{job_id}.webp: 256x256, " in ended.stderr
    piped = subprocess.run(
        [*IMG2IMG, "jobs", "result", job_id, "-o", "-", "--server", server], capture_output=True, timeout=60
    )
    assert (piped.returncode, piped.stdout) == (0, made.read_bytes())
    wrong = run("jobs", "result", job_id, "-o", str(tmp_path / "lion.png"), IMG2IMG_SERVER=server)
    assert (wrong.returncode, (tmp_path / "lion.png").exists()) == (2, False)
    assert "the picture is webp: end" in wrong.stderr


def test_ctrl_c_cancels_the_job(server: str, tmp_path: Path) -> None:
    """Ctrl-C while the picture is made cancels its job on the service; no file is written."""
    out = tmp_path / "lion.png"
    with Terminal("generate", "interrupted fake:step=5", "-o", str(out), IMG2IMG_SERVER=server) as terminal:
        terminal.shows("steps ")
        terminal.press_ctrl_c()
        assert terminal.wait() == 130
    assert "Stopped: the job is canceled" in terminal.text
    assert "Traceback" not in terminal.text
    assert not out.exists()
    job = jobs(server, "list", "--limit", "1")[0]
    assert job["parameters"]["prompt"] == "interrupted fake:step=5"
    eventually(lambda: jobs(server, "get", job["id"])[0]["state"] == "canceled", "the job to be canceled")


def test_a_second_ctrl_c_does_not_wait_and_claims_nothing(tmp_path: Path) -> None:
    """Nobody answers whether the job was created, let alone canceled."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Terminal("generate", "a lion", "-o", str(tmp_path / "a.png"), "--server", address) as terminal:
            terminal.shows("sending")
            terminal.press_ctrl_c()
            terminal.shows("canceling (Ctrl-C again: at once)")
            terminal.press_ctrl_c()
            assert terminal.wait() == 130, terminal.text
        assert "Stopped at once: a job that was created already may go on" in terminal.text
        assert "is canceled" not in terminal.text


@pytest.mark.parametrize("kind", ["gateway", "valkey"])
def test_a_crash_in_between_is_not_noticed(up: Up, tmp_path: Path, kind: str) -> None:
    """When the gateway or Valkey is killed while the picture is made, the command goes on and gets it."""
    out = tmp_path / "lion.png"
    with Terminal("generate", "a lion", "-o", str(out), IMG2IMG_SERVER=up.grpc) as terminal:
        terminal.shows("steps ")
        before = up.child(kind)
        kill(before)
        assert terminal.wait() == 0, terminal.text
        # The picture may have been there just before: the tests after this one need the service, too.
        eventually(lambda: up.child(kind) != before, f"another {kind}")
        eventually(up.is_ready, "readiness")
    assert look(out.read_bytes()) == ("PNG", (256, 256))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("generate", "x", "--steps", "30"), 1, "'/num_steps' must be <= 20 [invalid_request]"),
        (("generate", "x", "--server", "127.0.0.1:1"), 1, "No service answers at 127.0.0.1:1"),
        (("generate", str(DOG)), 2, "is a file: give a prompt after it"),
        (("generate", "missing.png", "x"), 2, "there is no file missing.png"),
        (("generate", "x", "-o", "/missing/x.png"), 2, "there is no folder /missing"),
        (("generate", "x", "-o", "x.gif"), 2, "pictures cannot be .gif: end x.gif in .png, .webp or .jpg"),
        (("generate", "a", "lion", "please"), 2, "in quotes"),
        (("jobs", "result", "0-1"), 1, "[job_not_found]"),
        (("jobs", "get", "0-1"), 1, "[job_not_found]"),
        (("jobs", "watch", "0-1"), 1, "[job_not_found]"),
    ],
)
def test_refusals_are_one_line(server: str, words: tuple[str, ...], status: int, message: str) -> None:
    """What is wrong is said in one line, with exit code 1, or 2 when the command itself was wrong."""
    ended = run(*words, IMG2IMG_SERVER=server)
    assert ended.returncode == status
    errors = [line for line in ended.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, ended.stderr
    assert message in errors[0]
    assert "Traceback" not in ended.stderr


def test_jobs_are_listed_watched_and_canceled(server: str, tmp_path: Path) -> None:
    """A job can be found, followed to its end and canceled from another terminal."""
    with Terminal(
        "generate", "[b]watched[/b] fake:step=5", "-o", str(tmp_path / "a.png"), IMG2IMG_SERVER=server
    ) as terminal:
        terminal.shows("steps ")
        job_id = jobs(server, "list", "--state", "running", "--limit", "1")[0]["id"]
        shown = run("jobs", "list", IMG2IMG_SERVER=server).stdout
        assert re.search(rf"{job_id} +running \d+/20 .*\[b\]watched\[/b\]", shown), shown
        assert "running" in run("jobs", "get", job_id, IMG2IMG_SERVER=server).stdout
        canceled = run("jobs", "cancel", job_id, IMG2IMG_SERVER=server)
        assert canceled.returncode == 0, canceled.stderr
        assert terminal.wait() == 1
    assert f"Job {job_id} canceled" in terminal.text
    events = jobs(server, "watch", job_id)
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert (events[0]["type"], events[-1]["type"]) == ("queued", "canceled")
    assert run("jobs", "watch", job_id, IMG2IMG_SERVER=server).stdout.rstrip().splitlines()[-1].find("canceled") > 0
