"""The engine as a worker uses it: asynchronous, cancelled at any time, never on the event loop."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from engine_helpers import collect, come_round, task_of, until

from img2img.errors import ConfigurationError, EngineFailed
from img2img.jobs import Stage
from worker.engines import base
from worker.engines.base import EngineInfo, Pictures, Progress
from worker.engines.diffusion import DiffusionEngine, EngineOptions
from worker.engines.diffusion.model import DiffusionModel

LONG = {"num_steps": 500, "width": 64, "height": 64}


@pytest.fixture
async def opened(tiny_4_channel_folder):
    async with DiffusionEngine(str(tiny_4_channel_folder), "cpu") as diffusion:
        yield diffusion


class Forwards:
    """UNet forwards: the name of the thread of each that has begun. While they are not ``free`` they do not end."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.free = threading.Event()
        self.free.set()

    async def first_held(self) -> None:
        """Wait until a forward has begun, which does not end."""
        await until(lambda: len(self.threads) == 1)
        assert not self.free.is_set()


@pytest.fixture
def forwards(monkeypatch) -> Iterator[Forwards]:
    found, predict_noise = Forwards(), DiffusionModel.predict_noise

    def record(*args):
        found.threads.append(threading.current_thread().name)
        assert found.free.wait(120)
        return predict_noise(*args)

    monkeypatch.setattr(DiffusionModel, "predict_noise", record)
    yield found
    found.free.set()


async def test_a_picture_from_the_bundled_model(dog):
    async with DiffusionEngine("emoji-sd", "cpu") as diffusion:
        assert diffusion.info == EngineInfo("diffusion", "emoji-sd", "cpu", (256, 256))
        assert (diffusion.slots(0), diffusion.slots(9)) == (4, 9)

        outputs = await collect(diffusion.generate(task_of(), Pictures(dog)))

    assert [item.step for item in outputs if isinstance(item, Progress) and item.stage == Stage.STEPS] == [
        0,
        1,
        2,
        3,
    ]
    assert isinstance(outputs[-1], base.Image)
    assert outputs[-1].picture.size == (256, 256)


async def test_the_model_runs_in_one_thread_of_its_own(opened, forwards):
    tasks = [collect(opened.generate(task_of(width=64, height=64, seed=seed), Pictures())) for seed in (1, 2)]

    await asyncio.gather(*tasks)

    assert set(forwards.threads) == {"diffusion-cpu_0"}


async def test_the_event_loop_stays_free(opened, monkeypatch):
    """It comes round within every pass through the model."""
    came_round: list[bool] = []
    loop, predict_noise = asyncio.get_running_loop(), DiffusionModel.predict_noise

    def wait_for_the_loop(*args):
        turned = threading.Event()
        loop.call_soon_threadsafe(turned.set)
        came_round.append(turned.wait(30))
        return predict_noise(*args)

    monkeypatch.setattr(DiffusionModel, "predict_noise", wait_for_the_loop)
    await collect(opened.generate(task_of(num_steps=4, width=64, height=64), Pictures()))

    assert came_round == [True] * 4


async def test_aclose_stops_after_the_step_in_progress(opened, forwards):
    forwards.free.clear()
    outputs = opened.generate(task_of(**LONG), Pictures())
    async for item in outputs:
        if item == Progress(Stage.STEPS, 0, 500):
            break
    await forwards.first_held()

    closing = asyncio.create_task(outputs.aclose())
    await come_round()
    assert not closing.done()
    forwards.free.set()
    await closing
    await collect(opened.generate(task_of(num_steps=4, width=64, height=64), Pictures()))

    assert len(forwards.threads) == 1 + 4


async def test_aclose_before_the_first_item_and_twice(opened, forwards):
    outputs = opened.generate(task_of(), Pictures())
    await outputs.aclose()
    await outputs.aclose()

    assert forwards.threads == []


async def test_cancelling_the_consumer_waits_until_the_thread_has_stopped(opened, forwards):
    """However often it is cancelled."""
    forwards.free.clear()
    consumer = asyncio.create_task(collect(opened.generate(task_of(**LONG), Pictures())))
    await forwards.first_held()

    for _ in range(2):
        consumer.cancel()
        await come_round()
        assert not consumer.done()
    forwards.free.set()
    with pytest.raises(asyncio.CancelledError):
        await consumer

    assert len(forwards.threads) == 1


async def test_a_task_cancelled_while_it_waits_never_starts(opened, forwards, monkeypatch):
    prompts: list[str] = []
    encode_text = DiffusionModel.encode_text

    def record(model, text):
        prompts.append(text)
        return encode_text(model, text)

    monkeypatch.setattr(DiffusionModel, "encode_text", record)
    forwards.free.clear()
    first = asyncio.create_task(collect(opened.generate(task_of(**LONG), Pictures())))
    await forwards.first_held()
    second = asyncio.create_task(collect(opened.generate(task_of(**LONG, prompt="second"), Pictures())))
    await come_round()

    second.cancel()
    await come_round()
    forwards.free.set()
    with pytest.raises(asyncio.CancelledError):
        await second
    first.cancel()
    await asyncio.wait([first])

    assert first.cancelled()
    assert "second" not in prompts


async def test_the_next_task_runs_after_one_was_cancelled(opened, forwards):
    forwards.free.clear()
    cancelled = asyncio.create_task(collect(opened.generate(task_of(**LONG), Pictures())))
    await forwards.first_held()
    cancelled.cancel()
    forwards.free.set()
    await asyncio.wait([cancelled])

    outputs = await collect(opened.generate(task_of(width=64, height=64), Pictures()))

    assert isinstance(outputs[-1], base.Image)


async def test_errors_of_the_thread_arrive_at_the_consumer(opened, monkeypatch):
    def encode_text(*_):
        raise EngineFailed("out of luck")

    monkeypatch.setattr(DiffusionModel, "encode_text", encode_text)

    with pytest.raises(EngineFailed, match="out of luck"):
        await collect(opened.generate(task_of(), Pictures()))


async def test_closing_the_engine_ends_what_still_runs(opened, forwards):
    forwards.free.clear()
    consumer = asyncio.create_task(collect(opened.generate(task_of(**LONG), Pictures())))
    await forwards.first_held()
    closing = asyncio.create_task(opened.__aexit__(None, None, None))
    await come_round()
    forwards.free.set()
    await closing

    assert len(forwards.threads) == 1
    with pytest.raises(EngineFailed, match="closed its engine"):
        await consumer


async def test_tasks_that_come_together_share_passes(tiny_4_channel_folder, forwards, monkeypatch):
    rows: list[int] = []
    predict_noise = DiffusionModel.predict_noise

    def record(self, latents, *rest):
        rows.append(len(latents))
        return predict_noise(self, latents, *rest)

    async with DiffusionEngine(str(tiny_4_channel_folder), "cpu", EngineOptions(max_rows=8)) as diffusion:
        monkeypatch.setattr(DiffusionModel, "predict_noise", record)
        forwards.threads.clear()  # the warm-up's
        forwards.free.clear()
        tasks = [task_of(width=64, height=64, num_steps=50, seed=seed) for seed in range(4)]
        made = asyncio.gather(*(collect(diffusion.generate(task, Pictures())) for task in tasks))
        await forwards.first_held()  # the others are there before its end
        forwards.free.set()
        await made

    assert max(rows) == 8
    assert sum(rows) == 4 * 50 * 2


@pytest.mark.parametrize("method", ["encode_text", "predict_noise", "decode_latents"])
async def test_a_device_that_fails_for_good_breaks_the_engine(tiny_4_channel_folder, monkeypatch, method):
    """After some errors of CUDA nothing works in a process: whoever waits hears of it, and the worker ends."""

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async with DiffusionEngine(str(tiny_4_channel_folder), "cpu") as diffusion:
        monkeypatch.setattr(DiffusionModel, method, fail)
        monkeypatch.setattr(DiffusionModel, "works", lambda _: False)
        with pytest.raises(EngineFailed, match="device or its driver failed"):
            await collect(diffusion.generate(task_of(width=64, height=64), Pictures()))
        await diffusion.broken()
        with pytest.raises(EngineFailed, match="device or its driver failed"):
            await collect(diffusion.generate(task_of(**LONG), Pictures()))


async def test_a_device_without_the_memory_for_its_rows_is_refused_at_the_door(tiny_4_channel_folder, monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionModel, "predict_noise", fill)

    with pytest.raises(ConfigurationError, match=r"memory of cpu .* IMG2IMG_MAX_ROWS=6 .* at 64x64: lower these"):
        async with DiffusionEngine(str(tiny_4_channel_folder), "cpu", EngineOptions(max_rows=6)):
            pass


async def test_a_model_that_is_not_there_is_refused_at_the_door():
    with pytest.raises(ConfigurationError, match="IMG2IMG_MODEL=nowhere does not exist"):
        async with DiffusionEngine("nowhere", "cpu"):
            pass

    await until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("diffusion")])


async def test_it_must_be_open():
    with pytest.raises(RuntimeError, match="async with"):
        await collect(DiffusionEngine("emoji-sd", "cpu").generate(task_of(), Pictures()))
