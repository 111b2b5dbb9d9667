"""What the tests of the engines share: the bundled model, tiny ones with 4 and 9 input channels, and an upstream."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from arq.connections import ArqRedis
from PIL import Image
from tiny_checkpoints import make_pipeline
from upstream_helpers import TOKENS, opened

from img2img.server import open_redis
from tests.upstream.api import Api
from tests.upstream.running import running_upstream
from tests.upstream.server import Upstream
from worker.engines.cloudflare import CloudflareEngine
from worker.engines.diffusion.model import DiffusionModel, open_model

DOG = Path(__file__).parents[2] / "examples" / "dog.png"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """diffusers' schedulers hand tensors to numpy 2 in a way that numpy is about to refuse."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
            )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads wait for each other at every operation when other processes want the cores as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emoji() -> DiffusionModel:
    return open_model("emoji-sd", "cpu")


@pytest.fixture(scope="session")
def tiny_4_channel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_tiny(tmp_path_factory, 4)


@pytest.fixture(scope="session")
def tiny_9_channel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_tiny(tmp_path_factory, 9)


@pytest.fixture(params=["tiny_4_channel_folder", "tiny_9_channel_folder"])
def tiny_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def tiny(tiny_4_channel_folder: Path) -> DiffusionModel:
    """A model of its own for each test, so that a test may break it."""
    return open_model(str(tiny_4_channel_folder), "cpu")


@pytest.fixture
def dog() -> Image.Image:
    return Image.open(DOG).convert("RGB")


@pytest.fixture
def right_half() -> Image.Image:
    """A mask of 256x256 that regenerates the right half."""
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (128, 0, 256, 256))
    return mask


def _save_tiny(factory: pytest.TempPathFactory, in_channels: int) -> Path:
    folder = factory.mktemp(f"tiny-{in_channels}")
    make_pipeline(in_channels).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with running_upstream(Api(TOKENS)) as running:
        yield running


@pytest.fixture
def api(upstream: Upstream) -> Api:
    upstream.api.reset()
    return upstream.api


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[ArqRedis]:
    async with open_redis(valkey_url) as connection:
        await connection.flushall()
        yield connection


@pytest.fixture
async def engine(valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis) -> AsyncIterator[CloudflareEngine]:
    async with opened(valkey_url, upstream.url) as engine:
        yield engine
