"""The jobs of bench/engine.py, and when they arrive: the same for every system."""

import random
from collections.abc import Mapping
from typing import Final

import msgspec

Size = tuple[int, int]
"""Width and height in pixels."""

PROMPTS: Final = ("a lion", "a dog", "a robot", "a pizza", "an owl", "a red apple", "Change to a lion", "a balloon")
STEPS: Final = (8, 12, 16, 20)
STRENGTHS: Final = (0.3, 0.5, 0.75, 1.0)
"""A few values of each, as callers have who send the defaults or round numbers: else no two jobs were alike, and
batches of equal parameters would not exist."""
GUIDANCES: Final[Mapping[float, int]] = {7.5: 3, 5.0: 1, 1.0: 1}
"""By how often; 1.0 is none."""
FROM_PICTURE: Final = 2 / 3
"""The share of jobs that change a picture."""


class Job(msgspec.Struct, frozen=True):
    """One picture to make, from the sample picture or from the prompt alone."""

    prompt: str
    size: Size
    num_steps: int
    strength: float
    guidance: float
    seed: int
    from_picture: bool = False

    @property
    def call(self) -> tuple[Size, int, float, float, bool]:
        """What jobs must have in common to share one call of a pipeline."""
        return self.size, self.num_steps, self.strength, self.guidance, self.from_picture


class Arrival(msgspec.Struct, frozen=True):
    """A job, and when it comes: seconds after the run's beginning."""

    at: float
    job: Job


def mixed_jobs(count: int, sizes: Mapping[Size, int], seed: int) -> list[Job]:
    """Jobs of all kinds; ``sizes`` says how often each is drawn. Without a picture, strength is 1."""
    draw = random.Random(seed)
    jobs = []
    for number in range(count):
        from_picture = draw.random() < FROM_PICTURE
        strength = draw.choice(STRENGTHS)
        jobs.append(
            Job(
                prompt=draw.choice(PROMPTS),
                size=draw.choices(list(sizes), list(sizes.values()))[0],
                num_steps=draw.choice(STEPS),
                strength=strength if from_picture else 1.0,
                guidance=draw.choices(list(GUIDANCES), list(GUIDANCES.values()))[0],
                seed=number,
                from_picture=from_picture,
            )
        )
    return jobs


def equal_jobs(count: int, size: Size) -> list[Job]:
    """Jobs that differ in their seeds only: text to image, 20 steps with guidance."""
    return [Job(PROMPTS[0], size, 20, 1.0, 7.5, seed) for seed in range(count)]


def warm_up_jobs(sizes: Mapping[Size, int]) -> list[Job]:
    """Short ones of every size, with guidance from a picture, and without from the prompt alone."""
    return [
        Job(PROMPTS[0], size, 2, 1.0, 7.5 if guided else 1.0, 0, guided) for size in sizes for guided in (True, False)
    ]


def at_once(jobs: list[Job]) -> list[Arrival]:
    return [Arrival(0.0, job) for job in jobs]


def poisson(jobs: list[Job], rate: float, seed: int) -> list[Arrival]:
    """Arrivals at random, ``rate`` a second on average; another rate only stretches the same pattern."""
    draw, at, arrivals = random.Random(seed), 0.0, []
    for job in jobs:
        at += draw.expovariate(1.0) / rate
        arrivals.append(Arrival(at, job))
    return arrivals
