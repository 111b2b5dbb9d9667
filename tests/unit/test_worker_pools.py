"""A worker gets engine and model from its pool in the pools file, and refuses settings that say otherwise."""

from pathlib import Path

import pytest

from img2img.errors import ConfigurationError
from img2img.settings import BUNDLED_MODEL, Settings
from worker.pool import settings_of_worker

FILE = """
[[pools]]
name = "gpu"
engine = "diffusion"
model = "/models/photo"

[[pools]]
name = "cpu"
engine = "diffusion"

[[pools]]
name = "burst"
engine = "cloudflare"
step_price = 0.0001
tenant_spend_per_day = 1.0

[[routes]]
pools = ["gpu", "cpu", "burst"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pools.toml"
    path.write_text(FILE)
    return path


def worker_of(file: Path, queue: str, **settings: str) -> tuple[str, str]:
    """Engine and model of a worker with these settings."""
    got = settings_of_worker(Settings(pools_file=file, queue=queue, **settings))
    return got.engine, got.model


def test_without_a_file_settings_stay_as_they_are() -> None:
    settings = Settings(engine="fake", model="/models/mine")
    assert settings_of_worker(settings) is settings


def test_engine_and_model_come_from_the_pool(file: Path) -> None:
    assert worker_of(file, "gpu") == ("diffusion", "/models/photo")


def test_a_pool_without_a_model_takes_that_of_the_settings(file: Path) -> None:
    assert worker_of(file, "cpu") == ("diffusion", BUNDLED_MODEL)
    assert worker_of(file, "cpu", model="/models/mine") == ("diffusion", "/models/mine")


def test_settings_that_say_the_same_are_welcome(file: Path) -> None:
    assert worker_of(file, "gpu", engine="diffusion", model="/models/photo") == ("diffusion", "/models/photo")
    assert worker_of(file, "burst", engine="cloudflare")[0] == "cloudflare"


def test_nothing_else_is_touched(file: Path) -> None:
    settings = settings_of_worker(Settings(pools_file=file, queue="burst", upstream_account="acme", concurrency=3))
    assert (settings.queue, settings.upstream_account, settings.concurrency) == ("burst", "acme", 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "IMG2IMG_QUEUE is 'default', which is no pool of {file}: set it to gpu or cpu or burst"),
        (
            {"queue": "gpu", "engine": "fake"},
            "IMG2IMG_ENGINE is 'fake', and the engine of pool 'gpu' in {file} is 'diffusion': "
            "unset IMG2IMG_ENGINE, or change the file",
        ),
        (
            {"queue": "gpu", "model": "/models/mine"},
            "IMG2IMG_MODEL is '/models/mine', and the model of pool 'gpu' in {file} is '/models/photo': "
            "unset IMG2IMG_MODEL, or change the file",
        ),
    ],
)
def test_what_does_not_fit_is_refused(file: Path, settings: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        settings_of_worker(Settings(pools_file=file, **settings))
    assert str(refused.value) == expected.format(file=file)


def test_an_upstream_is_not_asked_for_another_model(file: Path) -> None:
    file.write_text(FILE.replace('engine = "cloudflare"', 'engine = "cloudflare"\nmodel = "@cf/other"'))
    with pytest.raises(ConfigurationError, match=r"pool 'burst' has the model '@cf/other', .*: leave model out"):
        worker_of(file, "burst")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.toml cannot be read"):
        worker_of(tmp_path / "missing.toml", "gpu")
