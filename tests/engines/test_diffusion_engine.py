"""The engine as a worker uses it: asynchronous, cancelled at any time, never on the event loop."""

import asyncio
import threading
from contextlib import aclosing

import pytest
import torch
from engine_helpers import collect, task_of, until

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


@pytest.fixture
def forwards(monkeypatch) -> list[str]:
    """The name of the thread of every UNet forward."""
    threads: list[str] = []
    predict_noise = DiffusionModel.predict_noise

    def record(*args):
        threads.append(threading.current_thread().name)
        return predict_noise(*args)

    monkeypatch.setattr(DiffusionModel, "predict_noise", record)
    return threads


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

    assert set(forwards) == {"diffusion-cpu_0"}


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


async def test_aclose_stops_within_one_step(opened, forwards):
    async with aclosing(opened.generate(task_of(**LONG), Pictures())) as outputs:
        async for item in outputs:
            if item == Progress(Stage.STEPS, 3, 500):
                break
        before = len(forwards)
    after = len(forwards)
    await asyncio.sleep(0.1)

    assert after - before <= 2
    assert len(forwards) == after


async def test_aclose_before_the_first_item_and_twice(opened, forwards):
    outputs = opened.generate(task_of(), Pictures())
    await outputs.aclose()
    await outputs.aclose()

    assert forwards == []


async def test_cancelling_the_consumer_waits_until_the_thread_has_stopped(opened, forwards):
    consumer = asyncio.create_task(collect(opened.generate(task_of(**LONG), Pictures())))
    await until(lambda: len(forwards) > 2)

    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    after = len(forwards)
    await asyncio.sleep(0.1)

    assert len(forwards) == after


async def test_a_task_cancelled_while_it_waits_never_starts(opened, forwards):
    first = asyncio.create_task(collect(opened.generate(task_of(**LONG), Pictures())))
    await until(lambda: len(forwards) > 0)
    second = asyncio.create_task(collect(opened.generate(task_of(**LONG, prompt="second"), Pictures())))
    await asyncio.sleep(0.01)

    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(1):
            await second

    assert not first.done()
    first.cancel()
    await asyncio.wait([first])


async def test_the_next_task_runs_after_one_was_cancelled(opened, forwards):
    cancelled = asyncio.create_task(collect(opened.generate(task_of(**LONG), Pictures())))
    await until(lambda: len(forwards) > 0)
    cancelled.cancel()
    await asyncio.wait([cancelled])

    outputs = await collect(opened.generate(task_of(width=64, height=64), Pictures()))

    assert isinstance(outputs[-1], base.Image)


async def test_errors_of_the_thread_arrive_at_the_consumer(opened, monkeypatch):
    def encode_text(*_):
        raise EngineFailed("out of luck")

    monkeypatch.setattr(DiffusionModel, "encode_text", encode_text)

    with pytest.raises(EngineFailed, match="out of luck"):
        await collect(opened.generate(task_of(), Pictures()))


async def test_closing_the_engine_ends_what_still_runs(tiny_4_channel_folder, forwards):
    async with DiffusionEngine(str(tiny_4_channel_folder), "cpu") as diffusion:
        forwards.clear()  # the warm-up's
        consumer = asyncio.create_task(collect(diffusion.generate(task_of(**LONG), Pictures())))
        await until(lambda: len(forwards) > 0)

    assert len(forwards) < LONG["num_steps"]
    with pytest.raises(EngineFailed, match="closed its engine"):
        await consumer


async def test_tasks_that_come_together_share_passes(tiny_4_channel_folder, monkeypatch):
    rows: list[int] = []
    predict_noise = DiffusionModel.predict_noise

    def record(self, latents, *rest):
        rows.append(len(latents))
        return predict_noise(self, latents, *rest)

    async with DiffusionEngine(str(tiny_4_channel_folder), "cpu", EngineOptions(max_rows=8)) as diffusion:
        monkeypatch.setattr(DiffusionModel, "predict_noise", record)
        tasks = [task_of(width=64, height=64, num_steps=50, seed=seed) for seed in range(4)]
        await asyncio.gather(*(collect(diffusion.generate(task, Pictures())) for task in tasks))

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
        async with asyncio.timeout(5):
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
