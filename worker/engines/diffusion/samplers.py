"""Sampling arithmetic: which timesteps a job visits and what one step does to its latents. No network here.

The formulas are diffusers' schedulers': DPM-Solver++(2M) (arXiv 2211.01095), DDIM with eta 0
(arXiv 2010.02502), Euler and ancestral Euler (arXiv 2206.00364, algorithm 2 without churn, as k-diffusion).
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from img2img.requests import Sampler

DEFAULT_SAMPLER: Final = Sampler.DPMPP_2M


class Schedule:
    """One job's way from noise to picture: ``len(schedule)`` steps, taken in order and once.

    It keeps the sampler's memory (DPM++2M uses the step before), so each job has its own.
    """

    def __init__(self, scheduler: Any, steps: int, strength: float, device: torch.device) -> None:
        scheduler.set_timesteps(steps, device=device)
        begin = steps - count_steps(steps, strength)
        self._timesteps: torch.Tensor = scheduler.timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        self._scheduler = scheduler

    def __len__(self) -> int:
        return len(self._timesteps)

    def timestep(self, index: int) -> torch.Tensor:
        """The training timestep of a step, a scalar tensor for the UNet."""
        return self._timesteps[index]

    def pure_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Latents that hold nothing but noise, scaled as the sampler's first step expects."""
        scaled: torch.Tensor = noise * self._scheduler.init_noise_sigma
        return scaled

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        """Clean latents at the noise level that step ``index`` starts from.

        Call it with 0 before the first step, or with the next step's index: the scheduler counts along.
        """
        noised: torch.Tensor = self._scheduler.add_noise(latents, noise, self._timesteps[index : index + 1])
        return noised

    def scale_input(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """Latents as the UNet wants them (Euler's have a variance that grows with the noise level)."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self._timesteps[index])
        return scaled

    def step(
        self, prediction: torch.Tensor, latents: torch.Tensor, index: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Take step ``index``; ancestral Euler draws its noise from ``generator``."""
        stepped: torch.Tensor = self._scheduler.step(
            prediction, self._timesteps[index], latents, generator=generator, return_dict=False
        )[0]
        return stepped


def build_schedule(
    sampler: Sampler | None, config: Mapping[str, Any], steps: int, strength: float, device: torch.device
) -> Schedule:
    """The schedule of ``sampler`` (None: DPM++2M) for a model whose scheduler has ``config``.

    ``strength`` 1.0 is all of ``steps``; below it the last ``int(steps * strength)`` are taken, which must be
    at least one.
    """
    return Schedule(build_scheduler(sampler or DEFAULT_SAMPLER, config), steps, strength, device)


def build_scheduler(sampler: Sampler, config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler with the model's noise levels and prediction type.

    ``clip_sample`` and ``steps_offset`` are set as diffusers' Stable Diffusion pipelines set them: latents
    reach beyond -1..1, and not every published configuration says so.
    """
    settings = {**config, "clip_sample": False, "steps_offset": 1}
    match sampler:
        case Sampler.DPMPP_2M:
            return DPMSolverMultistepScheduler.from_config(  # type: ignore[no-untyped-call]
                settings, algorithm_type="dpmsolver++", solver_order=2
            )
        case Sampler.DDIM:
            return DDIMScheduler.from_config(settings)  # type: ignore[no-untyped-call]
        case Sampler.EULER:
            return EulerDiscreteScheduler.from_config(settings)  # type: ignore[no-untyped-call]
        case Sampler.EULER_A:
            return EulerAncestralDiscreteScheduler.from_config(settings)  # type: ignore[no-untyped-call]


def count_steps(steps: int, strength: float) -> int:
    """How many of ``steps`` image-to-image takes at ``strength``, as diffusers counts them."""
    return min(int(steps * strength), steps)


def guide(prediction: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598): (2N, ...) unconditional then conditional -> (N, ...)."""
    unconditional, conditional = prediction.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
