"""Sampling arithmetic as tables of numbers: which timesteps a job visits, and what one step does to its latents.

Every sampler here is linear in what it is given, so that one update serves them all, each row of a batch with numbers
of its own (see ``sampling``). The formulas are diffusers' schedulers': DPM-Solver++(2M) (arXiv 2211.01095, algorithm
2, midpoint), DDIM with eta 0 (arXiv 2010.02502, formula 12), Euler and ancestral Euler (arXiv 2206.00364, algorithm 2
without churn, as k-diffusion). The timesteps and noise levels are diffusers' own, so that every spacing that a
model's configuration asks for is honoured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from img2img.requests import Sampler

DEFAULT_SAMPLER: Final = Sampler.DPMPP_2M
STEPS_WITH_LOWER_ORDER: Final = 15
"""With fewer steps than this diffusers takes the last one of DPM++2M at first order, as its authors advise."""


class Step(NamedTuple):
    """One step, from latents ``x`` and the network's output ``e`` for ``scale * x`` at ``timestep`` to latents ``x'``::

        x0 = from_latents * x + from_output * e
        x' = latents * x + clean * x0 + previous * (x0 of the step before) + noise * (standard normal noise)

    A picture's own latents ``z`` at the noise level of ``x'`` are ``kept * z + kept_noise * noise``.
    """

    timestep: float
    scale: float
    from_latents: float
    from_output: float
    latents: float
    clean: float
    previous: float
    noise: float
    kept: float
    kept_noise: float


class Schedule(NamedTuple):
    """A job's way from noise to picture.

    Sampling begins with a picture's latents ``z`` as ``start_clean * z + start_noise * noise``, or with nothing but
    ``pure_noise * noise``.
    """

    sampler: Sampler
    steps: tuple[Step, ...]
    start_clean: float
    start_noise: float
    pure_noise: float

    @property
    def draws_noise(self) -> bool:
        """Whether each step draws noise of its own; diffusers draws it even where its factor is 0."""
        return self.sampler is Sampler.EULER_A

    @property
    def remembers(self) -> bool:
        """Whether a step uses the estimate of the step before."""
        return any(step.previous for step in self.steps)


class Samplers:
    """The schedules of a model whose scheduler has ``config``; each is computed once."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        # As diffusers' Stable Diffusion pipelines set them: latents reach beyond -1..1, and not every published
        # configuration says so.
        self._config = {**config, "clip_sample": False, "steps_offset": 1}
        self._known: dict[tuple[Sampler, int, int], Schedule] = {}

    def schedule(self, sampler: Sampler | None, num_steps: int, strength: float) -> Schedule:
        """The last ``count_steps(num_steps, strength)`` of ``num_steps`` steps, at least one; None is DPM++2M."""
        key = (sampler or DEFAULT_SAMPLER, num_steps, count_steps(num_steps, strength))
        if key not in self._known:
            self._known[key] = build_schedule(*key, self._config)
        return self._known[key]


def count_steps(steps: int, strength: float) -> int:
    """How many of ``steps`` image-to-image takes at ``strength``, as diffusers counts them."""
    return min(int(steps * strength), steps)


class Level(NamedTuple):
    """A noise level: latents there are ``clean`` times the clean ones and ``noise`` times noise.

    ``scale`` brings them to where the network expects them: where the squares of the two add up to 1.
    """

    clean: float
    noise: float
    scale: float = 1.0

    @property
    def sigma(self) -> float:
        """The noise part over the clean one."""
        return self.noise / self.clean

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio; infinite for clean latents."""
        return math.inf if self.noise == 0 else math.log(self.clean / self.noise)


CLEAN: Final = Level(1.0, 0.0)


class Path(NamedTuple):
    """The levels that each of a schedule's steps begins and ends at, and the scheduler's ``config``."""

    begins: Sequence[Level]
    ends: Sequence[Level]
    config: Any


Update = tuple[float, float, float, float]
"""The factors of latents, clean, previous and noise in ``Step``."""


def build_schedule(sampler: Sampler, num_steps: int, taken: int, config: Mapping[str, Any]) -> Schedule:
    """The last ``taken`` of ``num_steps`` steps, from a diffusers scheduler's timesteps and noise levels."""
    kind, path_of, update_of = SAMPLERS[sampler]
    scheduler = kind.from_config(config, **SOLVER) if sampler is Sampler.DPMPP_2M else kind.from_config(config)
    scheduler.set_timesteps(num_steps)
    path, first = path_of(scheduler), num_steps - taken
    convert = PREDICTIONS[scheduler.config.prediction_type]
    steps = []
    for index in range(first, num_steps):
        now, then = path.begins[index], path.begins[index + 1] if index + 1 < num_steps else CLEAN
        from_latents, from_output = convert(now.clean * now.scale, now.noise * now.scale)
        timestep, update = float(scheduler.timesteps[index]), update_of(path, index, first)
        steps.append(Step(timestep, now.scale, from_latents * now.scale, from_output, *update, then.clean, then.noise))
    start = path.begins[first]
    return Schedule(sampler, tuple(steps), start.clean, start.noise, float(scheduler.init_noise_sigma))


# How a network's output is turned into clean latents, from the level's clean and noise parts (their squares add up to
# 1).
PREDICTIONS: Final[Mapping[str, Callable[[float, float], tuple[float, float]]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (0.0, 1.0),
}


def _cumulative(scheduler: Any) -> Path:
    """DDIM's path: a step ends a fixed stride below its timestep, wherever the next one begins."""
    stride = scheduler.config.num_train_timesteps // len(scheduler.timesteps)

    def level(timestep: int) -> Level:
        kept = float(scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod)
        return Level(math.sqrt(kept), math.sqrt(1 - kept))

    timesteps = [int(timestep) for timestep in scheduler.timesteps]
    ends = [level(timestep - stride) for timestep in timesteps]
    return Path([level(timestep) for timestep in timesteps], ends, scheduler.config)


def _preserving(scheduler: Any) -> Path:
    """DPM++2M's path: latents keep their variance."""
    levels = []
    for sigma in map(float, scheduler.sigmas):
        clean = 1 / math.sqrt(sigma * sigma + 1)
        levels.append(Level(clean, sigma * clean))
    return Path(levels, levels[1:], scheduler.config)


def _growing(scheduler: Any) -> Path:
    """Euler's path: latents have a variance that grows with the noise."""
    levels = [Level(1.0, sigma, 1 / math.sqrt(sigma * sigma + 1)) for sigma in map(float, scheduler.sigmas)]
    return Path(levels, levels[1:], scheduler.config)


def _ddim(path: Path, index: int, first: int) -> Update:
    now, then = path.begins[index], path.ends[index]
    kept = then.noise / now.noise
    return kept, then.clean - kept * now.clean, 0.0, 0.0


def _dpmpp_2m(path: Path, index: int, first: int) -> Update:
    now, then, config = path.begins[index], path.ends[index], path.config
    step = then.log_snr - now.log_snr
    kept, gain = then.noise / now.noise, -then.clean * math.expm1(-step)
    few = config.lower_order_final and len(path.ends) < STEPS_WITH_LOWER_ORDER
    at_end = index + 1 == len(path.ends) and (few or config.euler_at_final or config.final_sigmas_type == "zero")
    if index == first or at_end:
        return kept, gain, 0.0, 0.0
    ratio = (now.log_snr - path.begins[index - 1].log_snr) / step
    slope = gain / (2 * ratio)
    return kept, gain + slope, -slope, 0.0


def _euler(path: Path, index: int, first: int) -> Update:
    kept = path.ends[index].sigma / path.begins[index].sigma
    return kept, 1 - kept, 0.0, 0.0


def _euler_ancestral(path: Path, index: int, first: int) -> Update:
    now, then = path.begins[index].sigma, path.ends[index].sigma
    up = math.sqrt(then**2 * (now**2 - then**2) / now**2)
    kept = math.sqrt(then**2 - up**2) / now
    return kept, 1 - kept, 0.0, up


SOLVER: Final = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
SAMPLERS: Final[Mapping[Sampler, tuple[Any, Callable[[Any], Path], Callable[[Path, int, int], Update]]]] = {
    Sampler.DPMPP_2M: (DPMSolverMultistepScheduler, _preserving, _dpmpp_2m),
    Sampler.DDIM: (DDIMScheduler, _cumulative, _ddim),
    Sampler.EULER: (EulerDiscreteScheduler, _growing, _euler),
    Sampler.EULER_A: (EulerAncestralDiscreteScheduler, _growing, _euler_ancestral),
}
