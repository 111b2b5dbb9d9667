"""One step of many jobs at once: gather their rows, one pass through the UNet, one update.

Rows do not see each other, so that jobs of any sampler, step and strength, with or without guidance or a mask, share
a pass. A guided job has two rows (without its prompt, and with it), an unguided one has one. Bit for bit a row
depends only on how many rows there are, which ``rows`` can fix, and where it stands; the arithmetic around the
network is made of single operations, each correctly rounded, whose results depend on nothing but their element (a
fused multiply-add may not be one everywhere).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from img2img.errors import EngineFailed
from worker.engines.diffusion.inpainting import Blend
from worker.engines.diffusion.model import DiffusionModel
from worker.engines.diffusion.samplers import Schedule, Step

NOT_FINITE: Final = "gave numbers that are not finite: lower guidance, or use another sampler"
OVERFLOWS: Final = "; where every picture fails so, set IMG2IMG_PRECISION=bfloat16 on the worker"
"""Some networks, VAEs above all, reach beyond float16's 65,504 whatever they are asked for."""


@dataclass
class Sampling:
    """A job's latents (1, 4, h, w) on their way from noise to picture; ``step`` of its schedule's steps are done.

    ``embeddings`` (1 or 2, window, features) has the negative prompt's first where there are two. ``noises`` (steps, 4,
    h, w) is there for samplers that draw noise in each step, ``extra`` (1, 5, h, w) for UNets of 9 channels, ``blend``
    for masks on those of 4. ``clean`` is the last step's estimate of the latents without noise.
    """

    schedule: Schedule
    embeddings: torch.Tensor
    guidance: float
    latents: torch.Tensor
    noises: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    blend: Blend | None = None
    step: int = 0
    clean: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows of a batch it takes."""
        return len(self.embeddings)

    @property
    def steps(self) -> int:
        return len(self.schedule.steps)

    @property
    def is_done(self) -> bool:
        return self.step == self.steps

    @property
    def next_step(self) -> Step:
        return self.schedule.steps[self.step]


def advance(model: DiffusionModel, batch: Sequence[Sampling], rows: int | None = None) -> list[EngineFailed | None]:
    """Take the next step of each, all of one size; answers for each why it cannot go on, or None.

    The pass is filled up to ``rows`` rows, if given, with copies of the first.
    """
    numbers = torch.tensor([sampling.next_step for sampling in batch], dtype=torch.float32, device=model.device)
    factor = dict(zip(Step._fields, numbers[:, :, None, None, None].unbind(1), strict=True))
    latents = torch.cat([sampling.latents for sampling in batch])
    output = _predict(model, batch, latents * factor["scale"], numbers[:, 0], rows)
    clean = factor["from_latents"] * latents + factor["from_output"] * output
    stepped = factor["latents"] * latents + factor["clean"] * clean
    if any(sampling.next_step.previous for sampling in batch):
        stepped = stepped + factor["previous"] * torch.cat([_remembered(sampling) for sampling in batch])
    if any(sampling.next_step.noise for sampling in batch):
        stepped = stepped + factor["noise"] * torch.cat([_noise(sampling) for sampling in batch])
    # This also waits for the device, so that progress and cancellation are never ahead of the work.
    finite = torch.isfinite(stepped).flatten(1).all(1).tolist()
    # All of it before any of them is changed: where memory gives out in between, each takes this step again.
    taken = [_taken(sampling, stepped[i : i + 1], clean[i : i + 1]) for i, sampling in enumerate(batch)]
    for sampling, good, left in zip(batch, finite, taken, strict=True):
        if good:
            sampling.latents, sampling.clean = left
            sampling.step += 1
    return [
        None if good else not_finite(model, f"Step {sampling.step + 1} of {sampling.steps}")
        for sampling, good in zip(batch, finite, strict=True)
    ]


def _predict(
    model: DiffusionModel,
    batch: Sequence[Sampling],
    inputs: torch.Tensor,
    timesteps: torch.Tensor,
    rows: int | None,
) -> torch.Tensor:
    """The network's output for each sampling, guidance applied (arXiv 2207.12598)."""
    owners = [i for i, sampling in enumerate(batch) for _ in range(sampling.rows)]
    ends = [sum(sampling.rows for sampling in batch[: i + 1]) - 1 for i in range(len(batch))]
    padding = 0 if rows is None else rows - len(owners)
    owner = torch.tensor(owners + owners[:1] * padding, device=model.device)
    embeddings = [sampling.embeddings for sampling in batch] + [batch[0].embeddings[:1]] * padding
    if extra := [sampling.extra for sampling in batch if sampling.extra is not None]:
        inputs = torch.cat([inputs, torch.cat(extra)], dim=1)
    output = model.predict_noise(inputs[owner], timesteps[owner], torch.cat(embeddings))
    if all(sampling.rows == 1 for sampling in batch):
        return output[: len(batch)]
    # Of an unguided job both are the same row, which guidance leaves as it is.
    begins = [end + 1 - sampling.rows for end, sampling in zip(ends, batch, strict=True)]
    unconditional, conditional = output[begins], output[ends]
    scales = torch.tensor([sampling.guidance for sampling in batch], dtype=torch.float32, device=model.device)
    return unconditional + scales[:, None, None, None] * (conditional - unconditional)


def _taken(sampling: Sampling, latents: torch.Tensor, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampling's latents after its step, and the estimate of them without noise."""
    if sampling.blend is not None:
        latents = sampling.blend.apply(latents, sampling.next_step)
    # Copies: a view would keep the whole batch's memory for as long as one of its jobs.
    return latents.clone(), clean.clone()


def not_finite(model: DiffusionModel, what: str) -> EngineFailed:
    """Why a picture is lost of which ``what`` gave numbers that are not finite."""
    return EngineFailed(f"{what} {NOT_FINITE}{OVERFLOWS if model.precision == 'float16' else ''}")


def _remembered(sampling: Sampling) -> torch.Tensor:
    return torch.zeros_like(sampling.latents) if sampling.clean is None else sampling.clean


def _noise(sampling: Sampling) -> torch.Tensor:
    if sampling.noises is None:
        return torch.zeros_like(sampling.latents)
    return sampling.noises[sampling.step : sampling.step + 1]
