"""The seed's own example on the bundled model: a picture of a dog, "Change to a lion", through every front end."""

import io
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from img2img.client import Client
from tests.stack import DOG, MODEL_PATH, Gateway, Stack

LION = Path(__file__).parents[2] / "docs" / "images" / "lion.png"
REQUEST: dict[str, Any] = {"prompt": "Change to a lion", "strength": 0.9, "guidance": 3.5, "seed": 1}


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack"), engine="auto") as stack:
        stack.worker()
        yield stack.gateway()


def distance(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference per channel, 0 to 255."""
    difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return sum(ImageStat.Stat(difference).mean) / 3


def test_the_dog_becomes_the_lion_on_every_front_end(gateway: Gateway) -> None:
    """Integers, base64, a form's file and gRPC bytes give the same bytes: the lion that the README shows."""
    data = DOG.read_bytes()
    run = MODEL_PATH.format(account="local")
    with gateway.client() as http, Client(gateway.grpc) as grpc:
        pictures = [
            http.post(run, json={**REQUEST, "image": list(data)}).content,
            http.post(run, json={**REQUEST, "image_b64": b64encode(data).decode()}).content,
            grpc.generate(image=data, **REQUEST).data,
        ]
        form = {name: str(value) for name, value in REQUEST.items()}
        wait = {"prefer": "wait=60"}
        job = http.post("/v1/jobs", data=form, files={"image": data}, headers=wait).json()
        pictures.append(http.get(job["links"]["image"]).content)
    assert len(set(pictures)) == 1
    lion, dog = Image.open(LION), Image.open(DOG)
    made = Image.open(io.BytesIO(pictures[0]))
    assert distance(made, lion) < 2, "not the picture in the README: other library versions round differently, not more"
    assert distance(made, dog) > 10


def test_the_seeds_curl_example_works(gateway: Gateway) -> None:
    """Text to image with nothing but a prompt, sent as curl does."""
    with gateway.client() as http:
        answer = http.post(
            MODEL_PATH.format(account="local"),
            content=b'{ "prompt": "cyberpunk cat" }',
            headers={"content-type": "application/x-www-form-urlencoded"},
        )
    assert Image.open(io.BytesIO(answer.content)).size == (256, 256)
