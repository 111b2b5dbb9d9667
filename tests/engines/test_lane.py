"""Many tasks in one lane: each gets what it would get alone, whatever comes, goes or breaks beside it."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from engine_helpers import (
    EVERY_STEP,
    LIMITS,
    Ordered,
    distance,
    furthest,
    lane_of,
    solo,
    submit,
    task_of,
    work_until_ended,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from img2img.jobs import Stage
from img2img.requests import Sampler
from worker.engines import base
from worker.engines.base import Checkpoint, Pictures, Preview, Progress, Shared, Task
from worker.engines.diffusion.batcher import Limits
from worker.engines.diffusion.lane import Lane
from worker.engines.diffusion.model import DiffusionModel, open_model
from worker.engines.receipts import pixels_digest

DOG = Path(__file__).parents[2] / "examples" / "dog.png"
SMALL = {"width": 64, "height": 64}
TALL = {"width": 64, "height": 72}


def catalogue() -> list[tuple[Task, Pictures]]:
    """Tasks that differ in everything in which tasks can differ."""
    dog = Image.open(DOG).convert("RGB").resize((64, 64))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (10, 13, 50, 60))
    texts = [
        (task_of(**size, sampler=sampler, num_steps=steps, guidance=guidance, seed=steps, strength=1.0), Pictures())
        for sampler, steps, guidance, size in (
            (Sampler.DPMPP_2M, 5, 5.0, SMALL),
            (Sampler.DDIM, 3, 1.0, SMALL),
            (Sampler.EULER, 6, 7.5, TALL),
            (Sampler.EULER_A, 4, 3.0, SMALL),
        )
    ]
    pictures = [
        (task_of(**SMALL, sampler=sampler, num_steps=7, strength=strength, guidance=guidance), Pictures(dog, masked))
        for sampler, strength, guidance, masked in (
            (Sampler.DPMPP_2M, 0.9, 3.5, None),
            (Sampler.EULER_A, 0.6, 1.0, mask),
            (Sampler.DDIM, 1.0, 4.0, mask),
            (None, 0.5, 2.0, mask),
        )
    ]
    return texts + pictures


def reproducible(task: Task) -> Task:
    return msgspec.structs.replace(task, reproducible=True)


@dataclass
class Studio:
    """A model, and what each task of the catalogue becomes alone: as usual, and in passes of fixed rows."""

    model: DiffusionModel
    tasks: list[tuple[Task, Pictures]]
    alone: list[base.Image]
    fixed: list[base.Image]


@pytest.fixture(scope="module", params=["tiny_4_channel_folder", "tiny_9_channel_folder"])
def studio(request: pytest.FixtureRequest) -> Studio:
    model = open_model(str(request.getfixturevalue(request.param)), "cpu")
    tasks = catalogue()
    alone = [solo(model, task, pictures) for task, pictures in tasks]
    fixed = [solo(model, reproducible(task), pictures) for task, pictures in tasks]
    return Studio(model, tasks, alone, fixed)


def test_together_as_alone_to_rounding(studio: Studio) -> None:
    lane = lane_of(studio.model)
    ordered = [submit(lane, task, pictures) for task, pictures in studio.tasks]
    work_until_ended(lane, *ordered)

    for one, expected in zip(ordered, studio.alone, strict=True):
        assert furthest(one.image.picture, expected.picture) <= 1


def test_reproducible_tasks_together_as_alone_to_the_byte(studio: Studio) -> None:
    """Beside each other, and beside others that fill up their passes."""
    lane = lane_of(studio.model)
    ordered = [submit(lane, reproducible(task), pictures) for task, pictures in studio.tasks]
    others = [submit(lane, task, pictures) for task, pictures in studio.tasks]
    work_until_ended(lane, *ordered, *others)

    for one, expected in zip(ordered, studio.fixed, strict=True):
        assert one.image.picture.tobytes() == expected.picture.tobytes()
        assert one.image.receipt == expected.receipt
    for one, expected in zip(others, studio.alone, strict=True):
        assert furthest(one.image.picture, expected.picture) <= 1


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [2, 3, 4, 6])
@pytest.mark.usefixtures("two_threads")
def test_reproducible_whatever_the_rows_and_threads(emoji: DiffusionModel, rows: int) -> None:
    """With some numbers of them the libraries split a pass in the midst of a row, so that places are not alike."""
    limits = Limits(8, 256 * 256, fixed_rows=rows)
    tasks = [reproducible(task_of(seed=seed, guidance=guidance)) for seed, guidance in ((1, 1.0), (2, 3.5), (3, 3.5))]
    alone = []
    for task in tasks:
        lane = lane_of(emoji, limits)
        alone.append(submit(lane, task))
        work_until_ended(lane, alone[-1])
    lane = lane_of(emoji, limits)
    together = [submit(lane, task) for task in tasks]
    others = [submit(lane, task_of(seed=seed)) for seed in range(3)]
    work_until_ended(lane, *together, *others)

    for one, expected in zip(together, alone, strict=True):
        assert one.image.picture.tobytes() == expected.image.picture.tobytes()


ACTIONS = st.one_of(
    st.tuples(st.just("join"), st.integers(0, 7), st.booleans()),
    st.tuples(st.just("turn"), st.integers(1, 4), st.none()),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.none()),
    st.tuples(st.just("interrupt"), st.integers(0, 30), st.none()),
)


@dataclass
class Visit:
    """A task of the catalogue in a random schedule."""

    index: int
    is_reproducible: bool
    interrupt: asyncio.Event
    ordered: Ordered


class Schedule:
    """A lane in which tasks come, go, and are resumed as a list of actions says."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._lane = lane_of(studio.model)
        self._visits: list[Visit] = []

    def play(self, actions: list[tuple[str, int, bool | None]]) -> None:
        for action, number, flag in actions:
            live = [visit for visit in self._visits if not visit.ordered.ended]
            if action == "join":
                self._join(number, bool(flag))
            elif action == "turn":
                self._turn(number)
            elif live:
                self._stop(live[number % len(live)], resumed=action == "interrupt")
        work_until_ended(self._lane, *(visit.ordered for visit in self._visits))

    def _join(self, index: int, is_reproducible: bool, resume: Checkpoint | None = None) -> None:
        task, pictures = self._studio.tasks[index]
        interrupt = asyncio.Event()
        task = reproducible(task) if is_reproducible else task
        ordered = submit(self._lane, task, pictures, resume, interrupt)
        self._visits.append(Visit(index, is_reproducible, interrupt, ordered))

    @torch.inference_mode()
    def _turn(self, times: int) -> None:
        for _ in range(times):
            if all(visit.ordered.ended for visit in self._visits):
                return
            self._lane.turn()

    def _stop(self, visit: Visit, *, resumed: bool) -> None:
        self._visits.remove(visit)
        if not resumed:
            visit.ordered.order.stopped.set()
        visit.interrupt.set()
        work_until_ended(self._lane, visit.ordered)
        assert visit.ordered.error is None
        if resumed:
            left = visit.ordered.checkpoints
            self._join(visit.index, visit.is_reproducible, left[-1] if left else None)

    def check(self) -> None:
        for visit in self._visits:
            made = visit.ordered.image.picture
            if visit.is_reproducible:
                assert made.tobytes() == self._studio.fixed[visit.index].picture.tobytes()
            else:
                assert furthest(made, self._studio.alone[visit.index].picture) <= 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=3, max_size=25))
def test_any_schedule_gives_each_task_its_own_picture(studio: Studio, actions: list) -> None:
    schedule = Schedule(studio)
    schedule.play(actions)
    schedule.check()


@pytest.mark.parametrize("index", range(8))
def test_resumed_from_any_step_to_the_byte(studio: Studio, index: int) -> None:
    task, pictures = studio.tasks[index]
    lane = lane_of(studio.model)
    whole = submit(lane, reproducible(task), pictures)
    work_until_ended(lane, whole)

    assert [checkpoint.step for checkpoint in whole.checkpoints] == list(range(1, whole.checkpoints[0].steps))
    for checkpoint in whole.checkpoints:
        elsewhere = lane_of(studio.model)
        resumed = submit(elsewhere, reproducible(task), pictures, checkpoint)
        work_until_ended(elsewhere, resumed)
        first = next(o for o in resumed.outputs if isinstance(o, Progress) and o.stage == Stage.STEPS)
        assert first.step == checkpoint.step
        assert resumed.image.picture.tobytes() == studio.fixed[index].picture.tobytes()


@pytest.mark.parametrize(
    "change", [{"seed": 99}, {"prompt": "a panda"}, {"reproducible": True}, {"width": 128}, {"num_steps": 6}], ids=str
)
def test_a_checkpoint_of_another_task_is_left_aside(tiny: DiffusionModel, change: dict[str, object]) -> None:
    task = task_of(**SMALL, num_steps=5)
    other = msgspec.structs.replace(task, **change)
    lane = lane_of(tiny)
    source = submit(lane, task)
    work_until_ended(lane, source)
    resumed = submit(lane, other, resume=source.checkpoints[-1])
    work_until_ended(lane, resumed)

    assert Progress(Stage.STEPS, 1, other.num_steps) in resumed.outputs
    assert resumed.image.picture.tobytes() == solo(tiny, other, Pictures()).picture.tobytes()


def test_a_damaged_checkpoint_is_left_aside(tiny: DiffusionModel) -> None:
    lane = lane_of(tiny)
    resumed = submit(lane, task_of(**SMALL), resume=Checkpoint(2, 4, b"no such thing"))
    work_until_ended(lane, resumed)

    assert Progress(Stage.STEPS, 1, 4) in resumed.outputs


def test_a_new_task_joins_at_the_next_step(tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    predict_noise = DiffusionModel.predict_noise

    def record(self: DiffusionModel, latents: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows.append(len(latents))
        return predict_noise(self, latents, *rest)

    monkeypatch.setattr(DiffusionModel, "predict_noise", record)
    lane = lane_of(tiny)
    first = submit(lane, task_of(**SMALL, num_steps=20))
    with torch.inference_mode():
        while len(rows) < 3:
            lane.turn()
        lane._pass_seconds = 60.0
        second = submit(lane, task_of(**SMALL, num_steps=2, guidance=1.0))
        lane.turn()

    assert rows == [2, 2, 2, 3]
    work_until_ended(lane, first, second)
    assert rows[4] == 3
    assert set(rows[5:]) == {2}


def test_a_task_tells_how_it_shared_its_passes(tiny: DiffusionModel) -> None:
    """How many there were, and of how many rows on average: a guided task has two."""
    lane = lane_of(tiny)
    longer, shorter = (submit(lane, task_of(**SMALL, num_steps=steps, strength=1.0)) for steps in (6, 3))
    work_until_ended(lane, longer, shorter)
    assert [output for output in shorter.outputs if isinstance(output, Shared)] == [Shared(3, 4.0)]
    assert [output for output in longer.outputs if isinstance(output, Shared)] == [Shared(6, 3.0)]


def test_previews_come_when_asked_for_and_look_like_the_picture(emoji: DiffusionModel) -> None:
    lane = lane_of(emoji, Limits(4, 256 * 256))
    asked, plain = submit(lane, task_of(previews=True, num_steps=8)), submit(lane, task_of(prompt="rocket"))
    work_until_ended(lane, asked, plain)

    previews = [output for output in asked.outputs if isinstance(output, Preview)]
    assert [preview.step for preview in previews] == list(range(1, 8))
    assert not [output for output in plain.outputs if isinstance(output, Preview)]
    assert previews[-1].picture.size == (32, 32)
    own, other = (one.image.picture.resize((32, 32), Image.Resampling.BOX) for one in (asked, plain))
    assert distance(previews[-1].picture, own) < 24
    assert distance(previews[-1].picture, own) < distance(previews[-1].picture, other) / 2


def test_a_receipt_tells_what_made_the_picture(studio: Studio) -> None:
    usual, fixed = studio.alone[0].receipt, studio.fixed[0].receipt

    assert usual is not None
    assert fixed is not None
    assert (usual.rows, fixed.rows) == (None, LIMITS.fixed_rows)
    assert (fixed.sampler, fixed.steps, fixed.precision) == ("dpmpp_2m", 5, "float32")
    assert fixed.pixels_sha256 == pixels_digest(studio.fixed[0].picture)
    assert set(fixed.weights) == {"text_encoder", "unet", "vae"}
    assert {"torch", "diffusers", "img2img"} <= set(fixed.versions)


def test_a_lane_that_idles_waits_for_orders(tiny: DiffusionModel) -> None:
    lane: Lane = lane_of(tiny, intervals=EVERY_STEP)
    lane.close()
    lane.turn()

    assert lane.load == 0
