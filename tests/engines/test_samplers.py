"""The tables of numbers take the steps that diffusers' own schedulers take."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from img2img.requests import Sampler
from worker.engines.diffusion.samplers import Samplers, count_steps

SCHEDULERS = {
    Sampler.DPMPP_2M: DPMSolverMultistepScheduler,
    Sampler.DDIM: DDIMScheduler,
    Sampler.EULER: EulerDiscreteScheduler,
    Sampler.EULER_A: EulerAncestralDiscreteScheduler,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHAPE = (1, 4, 5, 3)


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Anything that depends on both and is not linear."""
    return torch.sin(3 * x + timestep / 100)


def by_diffusers(sampler: Sampler, config: dict, steps: int, strength: float, clean, noise, generator):
    scheduler = SCHEDULERS[sampler].from_config({**config, "clip_sample": False, "steps_offset": 1})
    scheduler.set_timesteps(steps)
    begin = steps - count_steps(steps, strength)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    timesteps = scheduler.timesteps[begin:]
    x = scheduler.add_noise(clean, noise, timesteps[:1]) if clean is not None else noise * scheduler.init_noise_sigma
    for timestep in timesteps:
        output = network(scheduler.scale_model_input(x, timestep), float(timestep))
        x = scheduler.step(output, timestep, x, generator=generator, return_dict=False)[0]
    return x


def by_table(sampler: Sampler, config: dict, steps: int, strength: float, clean, noise, generator):
    schedule = Samplers(config).schedule(sampler, steps, strength)
    x = schedule.pure_noise * noise if clean is None else schedule.start_clean * clean + schedule.start_noise * noise
    previous = torch.zeros(SHAPE)
    for step in schedule.steps:
        output = network(x * step.scale, step.timestep)
        now = step.from_latents * x + step.from_output * output
        drawn = torch.randn(SHAPE, generator=generator) if schedule.draws_noise else torch.zeros(SHAPE)
        x = step.latents * x + step.clean * now + step.previous * previous + step.noise * drawn
        previous = now
    return x


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "strength"), [(1, 1.0), (2, 1.0), (5, 0.6), (14, 1.0), (15, 1.0), (20, 0.75), (20, 0.3)]
)
def test_each_sampler_goes_where_diffusers_goes(sampler, spacing, prediction, steps, strength):
    config = BETAS | {"timestep_spacing": spacing, "prediction_type": prediction}
    draws = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(SHAPE, generator=draws) for _ in range(2))
    original = None if strength == 1.0 else clean

    expected = by_diffusers(sampler, config, steps, strength, original, noise, torch.Generator().manual_seed(5))
    actual = by_table(sampler, config, steps, strength, original, noise, torch.Generator().manual_seed(5))

    # Rounding is relative to the largest number on the way, which the network here does not let die out.
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("sampler", list(Sampler))
def test_what_is_kept_is_noised_as_by_diffusers(sampler):
    """A mask's outside after each step: at the next step's level, clean after the last."""
    schedule = Samplers(BETAS).schedule(sampler, 6, 1.0)
    scheduler = SCHEDULERS[sampler].from_config({**BETAS, "clip_sample": False, "steps_offset": 1})
    scheduler.set_timesteps(6)
    one, zero = torch.ones(1), torch.zeros(1)

    for index, step in enumerate(schedule.steps[:-1]):
        level = scheduler.timesteps[index + 1 : index + 2]
        assert step.kept == pytest.approx(float(scheduler.add_noise(one, zero, level)), rel=1e-5)
        assert step.kept_noise == pytest.approx(float(scheduler.add_noise(zero, one, level)), rel=1e-5)
    assert (schedule.steps[-1].kept, schedule.steps[-1].kept_noise) == (1.0, 0.0)


def test_a_schedule_is_computed_once():
    samplers = Samplers(BETAS)

    assert samplers.schedule(None, 20, 0.75) is samplers.schedule(Sampler.DPMPP_2M, 20, 0.76)
