"""The fake engine behaves like a real one, and misbehaves on request."""

import asyncio
import hashlib
import time
from contextlib import aclosing
from importlib.metadata import version
from itertools import pairwise

import msgspec
import pytest
from engine_helpers import collect, distance, task_of
from PIL import Image, ImageChops

from img2img.errors import EngineFailed, ModelRefused
from img2img.jobs import Receipt, Stage
from img2img.requests import Sampler
from worker.engines.base import Checkpoint, EngineInfo, Pictures, Preview, Progress, Task
from worker.engines.base import Image as Finished
from worker.engines.fake import FakeEngine
from worker.safety import FakeSafetyChecker


async def picture_of(task: Task, pictures: Pictures | None = None, engine: FakeEngine | None = None) -> Image.Image:
    async with engine or FakeEngine() as fake:
        *_, last = await collect(fake.generate(task, pictures or Pictures()))
    assert isinstance(last, Finished)
    return last.picture


async def test_what_it_is():
    async with FakeEngine() as fake:
        assert fake.info == EngineInfo("fake", "fake", "cpu", (256, 256))
        assert (fake.slots(0), fake.slots(9)) == (1, 9)


async def test_the_same_task_gives_the_same_picture(dog):
    pictures = [await picture_of(task_of(), Pictures(dog)) for _ in range(2)]

    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert (pictures[0].size, pictures[0].mode) == ((256, 256), "RGB")


CHANGES = {
    "prompt": "Change to a cat",
    "negative_prompt": "blurry",
    "width": 264,
    "height": 264,
    "num_steps": 5,
    "strength": 0.76,
    "guidance": 3.6,
    "seed": 2,
    "sampler": Sampler.DDIM,
}
WAYS = {"reproducible": True, "previews": True, "deadline": 1.0}
"""Fields that say how to work, not what to draw."""


def test_every_field_has_a_change():
    assert set(CHANGES) | set(WAYS) == set(Task.__struct_fields__)


@pytest.mark.parametrize("field", WAYS)
async def test_how_it_works_changes_no_pixel(field):
    before = await picture_of(task_of())

    assert (await picture_of(msgspec.structs.replace(task_of(), **{field: WAYS[field]}))).tobytes() == before.tobytes()


@pytest.mark.parametrize("reproducible", [False, True])
async def test_its_receipt(dog, reproducible):
    task = task_of(sampler=Sampler.EULER_A, reproducible=reproducible)

    *_, last = await collect(FakeEngine().generate(task, Pictures(dog)))

    digest = hashlib.sha256(last.picture.tobytes()).hexdigest()
    assert last.receipt == Receipt(
        pixels_sha256=digest,
        model="fake",
        revision="fake-1",
        weights={},
        sampler="euler_a",
        steps=3,
        precision="none",
        device="cpu",
        versions={"img2img": version("img2img"), "pillow": version("pillow")},
        rows=1 if reproducible else None,
    )


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("has_input", [False, True])
async def test_every_field_changes_the_picture(dog, field, has_input):
    pictures = Pictures(dog) if has_input else Pictures()
    before = await picture_of(task_of(), pictures)

    after = await picture_of(msgspec.structs.replace(task_of(), **{field: CHANGES[field]}), pictures)

    assert before.tobytes() != after.tobytes()


async def test_one_changed_input_pixel_changes_the_picture(dog):
    before = await picture_of(task_of(), Pictures(dog.resize((1024, 1024))))
    changed = dog.resize((1024, 1024))
    changed.putpixel((700, 700), (1, 2, 3))

    assert (await picture_of(task_of(), Pictures(changed))).tobytes() != before.tobytes()


async def test_strength_moves_the_picture_away_from_the_input(dog):
    distances = [
        distance(dog, await picture_of(task_of(strength=strength), Pictures(dog)))
        for strength in (0.3, 0.4, 0.6, 0.9, 1.0)
    ]

    assert distances == sorted(distances)


async def test_pixels_outside_the_mask_stay(dog, right_half):
    result = await picture_of(task_of(), Pictures(dog, right_half))

    difference = ImageChops.difference(result, dog)
    assert difference.crop((0, 0, 128, 256)).getbbox() is None
    assert difference.crop((128, 0, 256, 256)).getbbox() == (0, 0, 128, 256)


async def test_it_reports_the_stages_of_a_real_engine(dog):
    outputs = await collect(FakeEngine().generate(task_of(), Pictures(dog)))

    assert outputs[:-1] == [
        Progress(Stage.ENCODE_TEXT),
        Progress(Stage.ENCODE_IMAGE),
        *(Progress(Stage.STEPS, step, 3) for step in range(4)),
        Progress(Stage.DECODE_IMAGE),
    ]


@pytest.mark.parametrize("engine", [FakeEngine(0.2), FakeEngine(10)], ids=["setting", "directive"])
async def test_steps_take_time_and_leave_the_loop_free(engine):
    """Ten tasks at once take their steps side by side, none of them sooner than it should."""
    prompt = "a dog fake:step=0.2" if engine._step_seconds == 10 else "a dog"
    stepped, ended = [], []

    async def run():
        async with aclosing(engine.generate(task_of(prompt=prompt), Pictures())) as outputs:
            async for item in outputs:
                if item == Progress(Stage.STEPS, 1, 4):
                    stepped.append(time.perf_counter())  # noqa: PERF401 - the time is that of the event
        ended.append(time.perf_counter())

    started = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(10)))

    assert max(stepped) < min(ended)
    assert min(ended) - started >= 4 * 0.2


async def test_aclose_stops_within_a_step():
    """Not at its end: a step lasts an hour here."""
    outputs = FakeEngine(3600).generate(task_of(num_steps=1000), Pictures())

    async def follow():
        async for item in outputs:
            if item == Progress(Stage.STEPS, 0, 1000):
                stepping.set()

    stepping = asyncio.Event()
    follower = asyncio.create_task(follow())
    await stepping.wait()
    follower.cancel()
    with pytest.raises(asyncio.CancelledError):
        await follower
    await outputs.aclose()


def of_kind(outputs, kind):
    return [output for output in outputs if isinstance(output, kind)]


@pytest.mark.parametrize(("width", "height", "size"), [(512, 256, (64, 32)), (256, 512, (32, 64))])
async def test_previews_come_after_each_step_when_asked_for(width, height, size):
    task = task_of(width=width, height=height, num_steps=3)
    assert of_kind(await collect(FakeEngine().generate(task, Pictures())), Preview) == []

    asked = msgspec.structs.replace(task, previews=True)
    twice = [of_kind(await collect(FakeEngine().generate(asked, Pictures())), Preview) for _ in range(2)]

    assert [(preview.step, preview.steps, preview.picture.size) for preview in twice[0]] == [
        (step, 3, size) for step in (1, 2, 3)
    ]
    assert [each.picture.tobytes() for each in twice[0]] == [each.picture.tobytes() for each in twice[1]]
    assert len({preview.picture.tobytes() for preview in twice[0]}) == 3


async def test_checkpoints_keep_their_interval():
    often = await collect(FakeEngine(checkpoint_seconds=1e-9).generate(task_of(num_steps=3), Pictures()))
    never = await collect(FakeEngine(checkpoint_seconds=0).generate(task_of(num_steps=3), Pictures()))
    seldom = await collect(FakeEngine().generate(task_of(num_steps=3), Pictures()))

    assert [(checkpoint.step, checkpoint.steps) for checkpoint in of_kind(often, Checkpoint)] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    assert of_kind(never + seldom, Checkpoint) == []


@pytest.mark.parametrize("has_input", [False, True])
async def test_a_resumed_task_goes_on_and_makes_the_same_picture(dog, has_input):
    pictures, task = Pictures(dog) if has_input else Pictures(), task_of(num_steps=9)
    whole = await collect(FakeEngine(checkpoint_seconds=1e-9).generate(task, pictures))
    second = of_kind(whole, Checkpoint)[1]
    later = msgspec.structs.replace(task, deadline=12345.0)

    rest = await collect(FakeEngine().generate(later, pictures, second))

    steps = [output.step for output in of_kind(rest, Progress) if output.stage == Stage.STEPS]
    assert steps == list(range(2, second.steps + 1))
    assert rest[-1].picture.tobytes() == whole[-1].picture.tobytes()


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", b'{"step":2,"task":"another"}'])
async def test_a_checkpoint_that_does_not_fit_is_left_aside(data):
    outputs = await collect(FakeEngine().generate(task_of(num_steps=3), Pictures(), Checkpoint(2, 3, data)))

    assert Progress(Stage.STEPS, 0, 3) in outputs
    assert isinstance(outputs[-1], Finished)


async def test_another_tasks_checkpoint_is_left_aside():
    task = task_of(num_steps=3)
    whole = await collect(FakeEngine(checkpoint_seconds=1e-9).generate(task, Pictures()))

    outputs = await collect(
        FakeEngine().generate(msgspec.structs.replace(task, seed=2), Pictures(), of_kind(whole, Checkpoint)[0])
    )

    assert Progress(Stage.STEPS, 0, 3) in outputs


async def test_an_interrupt_ends_it_after_its_step_with_a_checkpoint():
    interrupt = asyncio.Event()
    outputs = []
    async for output in FakeEngine(checkpoint_seconds=0).generate(task_of(num_steps=9), Pictures(), None, interrupt):
        outputs.append(output)
        if output == Progress(Stage.STEPS, 4, 9):
            interrupt.set()

    assert [(checkpoint.step, checkpoint.steps) for checkpoint in of_kind(outputs, Checkpoint)] == [(4, 9)]
    assert isinstance(outputs[-1], Checkpoint)


async def test_fail_every_time():
    engine = FakeEngine()

    for _ in range(3):
        with pytest.raises(EngineFailed):
            await picture_of(task_of(prompt="fake:fail"), engine=engine)


async def test_fail_so_many_attempts_of_one_prompt_and_seed():
    engine = FakeEngine()
    task = task_of(prompt="a dog fake:fail=2")

    for _ in range(2):
        with pytest.raises(EngineFailed):
            await picture_of(task, engine=engine)
    await picture_of(task, engine=engine)

    with pytest.raises(EngineFailed):
        await picture_of(msgspec.structs.replace(task, seed=2), engine=engine)


async def test_refuse():
    with pytest.raises(ModelRefused):
        await picture_of(task_of(prompt="fake:refuse"))


async def test_a_picture_is_marked_as_unsafe_only_on_request():
    marked = await picture_of(task_of(prompt="a lion fake:unsafe"))

    assert FakeSafetyChecker().is_unsafe(marked)
    assert not FakeSafetyChecker().is_unsafe(await picture_of(task_of()))


async def test_block_holds_up_the_event_loop():
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    await picture_of(task_of(prompt="fake:block=0.3"))
    ticker.cancel()

    assert max(after - before for before, after in pairwise(ticks)) >= 0.3


async def test_without_obedience_it_only_takes_its_time(dog):
    engine = FakeEngine(obeys=False)
    prompt = "fake:fail fake:refuse fake:block=1000 fake:hang fake:crash"

    outputs = await collect(engine.generate(task_of(prompt=prompt), Pictures(dog)))

    assert isinstance(outputs[-1], Finished)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect(engine.generate(task_of(prompt="fake:step=1000"), Pictures())), 0.1)
