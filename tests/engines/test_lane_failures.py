"""A lane whose tasks fail, do not fit, or are stopped: each alone, and each is told why."""

import asyncio
import itertools

import pytest
import torch
from engine_helpers import furthest, lane_of, solo, submit, task_of, work_until_ended
from PIL import Image
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.testing import capture_logs

from img2img.errors import EngineFailed
from img2img.jobs import Stage
from worker.engines import base
from worker.engines.base import Pictures, Progress
from worker.engines.diffusion.inpainting import Blend
from worker.engines.diffusion.lane import Intervals
from worker.engines.diffusion.model import DiffusionModel
from worker.engines.diffusion.samplers import Step

SMALL = {"width": 64, "height": 64}


def test_numbers_that_are_not_finite_fail_their_task_alone(
    tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_noise = DiffusionModel.predict_noise

    def spoil(self: DiffusionModel, latents: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        output = predict_noise(self, latents, *rest)
        output[0] = torch.nan
        return output

    lane = lane_of(tiny)
    spoilt, sound = submit(lane, task_of(**SMALL, deadline=1.0)), submit(lane, task_of(**SMALL, deadline=2.0))
    with torch.inference_mode():
        lane._pass_seconds = 60.0
        with monkeypatch.context() as patch:
            patch.setattr(DiffusionModel, "predict_noise", spoil)
            lane.turn()
    work_until_ended(lane, spoilt, sound)

    assert isinstance(spoilt.error, EngineFailed)
    assert "Step 1 of 4 gave numbers that are not finite" in str(spoilt.error)
    assert furthest(sound.image.picture, solo(tiny, task_of(**SMALL), Pictures()).picture) <= 1


def test_an_error_in_a_pass_fails_the_task_that_causes_it_alone(
    tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_noise = DiffusionModel.predict_noise

    def fail(self: DiffusionModel, latents: torch.Tensor, timesteps: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if len(latents) % 2:
            raise RuntimeError("an unguided job is too much for this model")
        return predict_noise(self, latents, timesteps, *rest)

    monkeypatch.setattr(DiffusionModel, "predict_noise", fail)
    lane = lane_of(tiny)
    culprit, sound = submit(lane, task_of(**SMALL, guidance=1.0)), submit(lane, task_of(**SMALL))
    work_until_ended(lane, culprit, sound)

    assert isinstance(culprit.error, EngineFailed)
    assert isinstance(sound.image, base.Image)


def test_what_is_logged_of_a_task_names_its_job(tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane's thread belongs to no job: each task brings what its own job's lines say."""

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("this model takes nothing")

    monkeypatch.setattr(DiffusionModel, "predict_noise", fail)
    lane, ordered = lane_of(tiny), []
    for job in ("0-one", "0-other"):
        with bound_contextvars(job=job):
            ordered.append(submit(lane, task_of(**SMALL)))
    with capture_logs([merge_contextvars]) as lines:
        work_until_ended(lane, *ordered)
    assert [line["job"] for line in lines if line["event"] == "model_failed"] == ["0-one", "0-other"]


def test_out_of_memory_makes_passes_smaller_and_fails_nobody(
    tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_noise = DiffusionModel.predict_noise
    rows: list[int] = []

    def fill(self: DiffusionModel, latents: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows.append(len(latents))
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict_noise(self, latents, *rest)

    monkeypatch.setattr(DiffusionModel, "predict_noise", fill)
    lane = lane_of(tiny)
    ordered = [submit(lane, task_of(**SMALL, seed=seed)) for seed in range(4)]
    work_until_ended(lane, *ordered)

    assert [one.error for one in ordered] == [None] * 4
    assert sum(count > 3 for count in rows) <= 2


def test_memory_that_gives_out_after_a_pass_takes_no_step_twice(
    tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pass gave the first is its last step's: there is none after it, and the second has not got its own."""
    task = task_of(**SMALL, num_steps=1, strength=1.0)
    masked = Pictures(Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255))
    expected = solo(tiny, task, masked).picture
    apply, calls = Blend.apply, itertools.count(1)

    def fill(self: Blend, latents: torch.Tensor, step: Step) -> torch.Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return apply(self, latents, step)

    monkeypatch.setattr(Blend, "apply", fill)
    lane = lane_of(tiny)
    lane._pass_seconds = 60.0  # both are ready for the first pass
    ordered = [submit(lane, task, masked) for _ in range(2)]
    work_until_ended(lane, *ordered)

    assert next(calls) == 5
    for one in ordered:
        assert furthest(one.image.picture, expected) <= 1


def test_a_task_that_does_not_fit_alone_fails_and_says_what_to_do(
    tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_noise = DiffusionModel.predict_noise

    def fill(self: DiffusionModel, latents: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if latents.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict_noise(self, latents, *rest)

    monkeypatch.setattr(DiffusionModel, "predict_noise", fill)
    lane = lane_of(tiny)
    large, small = submit(lane, task_of(width=128, height=128)), submit(lane, task_of(**SMALL))
    work_until_ended(lane, large, small)

    assert isinstance(large.error, EngineFailed)
    assert "ask for a smaller picture" in str(large.error)
    assert small.error is None


def test_a_full_device_still_works(tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it does not once CUDA has failed; torch has one error below the other."""

    def fill(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", fill)
    assert tiny.works()
    monkeypatch.setattr(torch, "ones", fail)
    assert not tiny.works()


def test_a_stopped_task_takes_no_further_step_and_says_nothing(tiny: DiffusionModel) -> None:
    lane = lane_of(tiny)
    stopped, other = submit(lane, task_of(**SMALL, num_steps=20)), submit(lane, task_of(**SMALL, num_steps=20))
    with torch.inference_mode():
        while Progress(Stage.STEPS, 3, 20) not in stopped.outputs:
            lane.turn()
        stopped.order.stopped.set()
        said = len(stopped.outputs)
        lane.turn()

    assert stopped.ended
    assert stopped.error is None
    assert len(stopped.outputs) == said
    work_until_ended(lane, other)


def test_an_interrupted_task_ends_with_a_checkpoint_where_it_has_begun(tiny: DiffusionModel) -> None:
    interrupt = asyncio.Event()
    lane = lane_of(tiny, intervals=Intervals(checkpoint=0.0))
    begun, waiting = submit(lane, task_of(**SMALL, num_steps=20), interrupt=interrupt), None
    with torch.inference_mode():
        while Progress(Stage.STEPS, 3, 20) not in begun.outputs:
            lane.turn()
        waiting = submit(lane, task_of(**SMALL), interrupt=interrupt)
        interrupt.set()
        lane.turn()

    assert begun.ended
    assert begun.outputs[-1] == begun.checkpoints[-1]
    assert begun.checkpoints[-1].step == 3
    assert waiting.ended
    assert waiting.outputs == []


def test_closing_fails_what_is_left(tiny: DiffusionModel) -> None:
    lane = lane_of(tiny)
    begun, waiting = submit(lane, task_of(**SMALL, num_steps=20)), None
    with torch.inference_mode():
        for _ in range(3):
            lane.turn()
    waiting = submit(lane, task_of(**SMALL))
    lane.close()
    lane.run()

    for one in (begun, waiting):
        assert isinstance(one.error, EngineFailed)
        assert "closed its engine" in str(one.error)
