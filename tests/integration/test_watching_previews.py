"""Previews from the engine to whoever watches, over SSE, gRPC and the command line."""

import io
import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from img2img.client import Client, JobOptions
from tests.stack import Gateway, Stack, submit
from tests.up.running import run

STEPS = 4
SLOW = "a dog fake:step=0.5"
"""A watcher has half a second to read each preview before the next one takes its picture."""
ASKED = {"previews": True}


@pytest.fixture(scope="module")
def stack(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack"), preview_interval="0", progress_interval="0") as stack:
        stack.worker(concurrency="4")
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Gateway:
    return stack.gateway()


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def events(client: httpx.Client, job_id: str, after: int = 0, until: int | None = None) -> list[dict[str, Any]]:
    """The stream's events up to its end, or to the preview of step ``until``."""
    found = []
    with client.stream("GET", f"/v1/jobs/{job_id}/events", params={"after": after}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                if until is not None and (found[-1]["type"], found[-1].get("step")) == ("preview", until):
                    break
    return found


def previews(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in found if event["type"] == "preview"]


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "WEBP"
        return opened.size


def test_a_job_shows_what_it_has_after_each_step(client: httpx.Client) -> None:
    """Numbered like every event, with a small picture that changes; the last one's picture ends with the attempt."""
    job_id = submit(client, prompt=SLOW, num_steps=STEPS, width=512, height=256, options=ASKED)["id"]
    found = events(client, job_id)
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    assert [(event["step"], event["steps"]) for event in previews(found)] == [(n, STEPS) for n in range(1, STEPS + 1)]
    assert {event["state"] for event in previews(found)} == {"running"}
    shown = [event["preview"] for event in previews(found)[:-1]]
    for preview in shown:
        assert (preview["media_type"], preview["width"], preview["height"]) == ("image/webp", 64, 32)
        assert size_of(b64decode(preview["image"], validate=True)) == (64, 32)
    assert len({preview["image"] for preview in shown}) == STEPS - 1


def test_the_log_keeps_one_picture_while_the_job_runs_and_none_after(client: httpx.Client) -> None:
    """Numbers and steps stay as they were, so that a stream can be resumed anywhere."""
    job_id = submit(client, prompt=SLOW, num_steps=STEPS, options=ASKED)["id"]
    events(client, job_id, until=2)
    meanwhile = events(client, job_id, until=2)
    assert ["preview" in event for event in previews(meanwhile)] == [False, True]
    rest = events(client, job_id, after=meanwhile[-1]["seq"])
    whole = events(client, job_id)
    marks = [[(event["seq"], event["type"], event["at"]) for event in found] for found in (meanwhile + rest, whole)]
    assert marks[0] == marks[1]
    assert [event["step"] for event in previews(whole)] == list(range(1, STEPS + 1))
    assert not any("preview" in event for event in whole)


def test_nobody_is_shown_what_was_not_asked_for(client: httpx.Client) -> None:
    job_id = submit(client, prompt="a dog fake:step=0.02", num_steps=STEPS)["id"]
    found = events(client, job_id)
    assert found[-1]["type"] == "succeeded"
    assert previews(found) == []


def test_the_python_client_gets_them_as_bytes(client: httpx.Client, gateway: Gateway) -> None:
    """gRPC tells the same as SSE, the attempt besides."""
    with Client(gateway.grpc) as grpc:
        job = grpc.create(prompt=SLOW, num_steps=STEPS, options=JobOptions(previews=True))
        assert job.options.previews
        watched = list(grpc.watch(job.id))
    shown = [event for event in watched if event.type == "preview"]
    assert [(event.step, event.steps, event.attempt, event.stage) for event in shown] == [
        (step, STEPS, 1, "") for step in range(1, STEPS + 1)
    ]
    for event in shown[:-1]:
        assert event.preview is not None
        assert size_of(event.preview.image) == (event.preview.width, event.preview.height) == (64, 64)
    after = events(client, job.id)
    assert [(event["seq"], event["type"]) for event in after] == [(event.sequence, event.type) for event in watched]


def test_the_command_writes_the_newest_preview_to_a_file(gateway: Gateway, tmp_path: Path) -> None:
    """And ``jobs watch`` has a line for each."""
    shown, made = tmp_path / "now.webp", tmp_path / "lion.png"
    address = {"IMG2IMG_SERVER": gateway.grpc}
    options = ("-o", str(made), "--preview-file", str(shown), "--steps", str(STEPS))
    ended = run("generate", SLOW, *options, **address)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lion.png", "now.webp"]
    assert size_of(shown.read_bytes()) == (64, 64)
    job_id = ended.stderr.split()[-1]
    lines = run("jobs", "watch", job_id, **address).stdout.splitlines()
    assert [line.split()[-1] for line in lines if " preview " in line] == [f"{n}/{STEPS}" for n in range(1, STEPS + 1)]


def test_a_preview_file_in_no_folder_is_usage(gateway: Gateway, tmp_path: Path) -> None:
    ended = run("generate", "x", "--preview-file", str(tmp_path / "none" / "now.webp"), IMG2IMG_SERVER=gateway.grpc)
    assert ended.returncode == 2
    assert "there is no folder" in ended.stderr
