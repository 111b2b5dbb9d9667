"""The loop that both trainings share: a budget, a cosine decay, averaged weights, and a state to go on from."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.networks import pick_precision

WARMUP_STEPS: Final = 100
LAST_RATE: Final = 0.05
"""Share of the learning rate at the end of the cosine decay."""
AVERAGE_KEEPS: Final = 0.997
"""Of the averaged weights at each step, once there have been enough of them."""
GRADIENT_NORM: Final = 1.0
SAVE_SECONDS: Final = 180.0
REPORT_STEPS: Final = 10
LOSS_KEEPS: Final = 0.98


class Budget(NamedTuple):
    """How long to train, all sittings together: ``steps`` if they are given, else ``minutes``."""

    minutes: float
    steps: int | None = None

    def spent(self, steps: int, seconds: float) -> float:
        """The share that is used up, 0 to 1."""
        return min(1.0, steps / self.steps if self.steps else seconds / (60 * self.minutes))


class Part(NamedTuple):
    """A network to train and its highest learning rate."""

    network: Any
    rate: float


LossOf = Callable[[torch.Generator], torch.Tensor]
"""One batch's loss, with all that is left to chance drawn from the generator, which is on the training's device."""


class Training:
    """Trains networks until a budget is spent, and saves where it is every few minutes.

    ``identity`` tells trainings apart: a state that was saved under another one, or on another kind of device, is
    refused. ``averages`` are copies of the networks with averaged weights, which is what to keep.
    """

    def __init__(
        self,
        parts: dict[str, Part],
        device: torch.device,
        seed: int,
        state: Path,
        identity: dict[str, Any],
    ) -> None:
        self.device = device
        self.networks = {name: _place(part.network, device) for name, part in parts.items()}
        self.averages = {
            name: copy.deepcopy(network).eval().requires_grad_(False) for name, network in self.networks.items()
        }
        self.generator = torch.Generator(device).manual_seed(seed)
        self.steps = 0
        self.seconds = 0.0
        self.loss = torch.ones((), device=device)
        self._rates = [part.rate for part in parts.values()]
        self._precision = pick_precision(device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._precision == torch.float16)
        self._optimizer = torch.optim.AdamW(
            [{"params": list(network.parameters())} for network in self.networks.values()],
            betas=(0.9, 0.98),
            weight_decay=1e-4,
            fused=True,
        )
        self._state = state
        self._identity = {**identity, "device": device.type}
        self._load()

    def run(self, title: str, budget: Budget, batch: int, loss_of: LossOf) -> None:
        """Train until the budget is spent, with loss and samples a second on a progress bar."""
        with _progress() as progress:
            bar = progress.add_task(title, total=1.0, loss="", speed="")
            began, offset, first = time.monotonic(), self.seconds, self.steps
            saved = began
            while (spent := budget.spent(self.steps, self.seconds)) < 1:
                self._step(spent, loss_of)
                self.seconds = offset + time.monotonic() - began
                if self.steps % REPORT_STEPS == 0:
                    speed = batch * (self.steps - first) / (time.monotonic() - began)
                    progress.update(bar, completed=spent, loss=f"{self.loss.item():.4f}", speed=f"{speed:.0f}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
            progress.update(bar, completed=1.0)
        self._save()

    def autocast(self) -> torch.autocast:
        """Half precision where the device has it."""
        return torch.autocast(self.device.type, self._precision, enabled=self._precision != torch.float32)

    def _step(self, spent: float, loss_of: LossOf) -> None:
        warmth = min(1.0, (self.steps + 1) / WARMUP_STEPS)
        decay = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * spent))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * warmth * decay
        loss = loss_of(self.generator)
        self._optimizer.zero_grad()
        torch.autograd.backward(self._scaler.scale(loss))
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(
            [weights for network in self.networks.values() for weights in network.parameters()], GRADIENT_NORM
        )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average()
        loss = loss.detach()
        self.loss = torch.lerp(loss, self.loss, LOSS_KEEPS) if self.steps else loss
        self.steps += 1

    @torch.no_grad()
    def _average(self) -> None:
        # The first weights are far from the last ones: they are to be forgotten soon.
        kept = min(AVERAGE_KEEPS, (1 + self.steps) / (10 + self.steps))
        for name, network in self.networks.items():
            for average, weights in zip(self.averages[name].parameters(), network.parameters(), strict=True):
                average.lerp_(weights, 1 - kept)

    def _save(self) -> None:
        state = {
            "identity": self._identity,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "averages": {name: network.state_dict() for name, network in self.averages.items()},
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        self._state.parent.mkdir(parents=True, exist_ok=True)
        part = self._state.with_name(f"{self._state.name}.part")
        torch.save(state, part)
        part.replace(self._state)

    def _load(self) -> None:
        if not self._state.exists():
            return
        state = torch.load(self._state, map_location="cpu", weights_only=True)
        if state["identity"] != self._identity:
            raise click.ClickException(
                f"{self._state} is of a training with other options: give those to go on with it, or delete it"
            )
        for name in self.networks:
            self.networks[name].load_state_dict(state["networks"][name])
            self.averages[name].load_state_dict(state["averages"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.loss = state["loss"].to(self.device)


def _place(network: Any, device: torch.device) -> Any:
    return network.to(device, torch.float32, memory_format=torch.channels_last).train().requires_grad_(True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  loss {task.fields[loss]}  {task.fields[speed]} samples/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
