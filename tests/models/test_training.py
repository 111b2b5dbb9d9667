"""The loop of both trainings: it learns, keeps to its budget, and goes on where it stopped."""

from pathlib import Path
from typing import Any

import click
import pytest
import torch

from models import training as loop
from models.training import Budget, Part, Training

LINE = torch.tensor([[2.0, -1.0]])


class Stopped(Exception):
    """Ends a training as a crash would."""


def begin(state: Path, **identity: Any) -> Training:
    torch.manual_seed(1)
    return Training({"line": Part(torch.nn.Linear(2, 1), 0.05)}, torch.device("cpu"), 1, state, identity)


def run(training: Training, steps: int, stop_at: int | None = None) -> None:
    def loss_of(generator: torch.Generator) -> torch.Tensor:
        if training.steps == stop_at:
            raise Stopped
        points = torch.randn((8, 2), generator=generator)
        loss: torch.Tensor = (training.networks["line"](points) - points @ LINE.T).square().mean()
        return loss

    training.run("Line", Budget(minutes=60, steps=steps), 8, loss_of)


def weights(training: Training) -> list[float]:
    return torch.cat([average.flatten() for average in training.averages["line"].parameters()]).tolist()


def test_it_learns(tmp_path: Path) -> None:
    """Averaged weights come to the line that the points lie on."""
    training = begin(tmp_path / "state")
    run(training, 400)
    assert training.steps == 400
    assert weights(training) == pytest.approx([2, -1, 0], abs=0.1)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    one, two = (begin(tmp_path / name) for name in ("one", "two"))
    run(one, 20)
    run(two, 20)
    assert weights(one) == weights(two)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = begin(tmp_path / "whole")
    run(whole, 20)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    with pytest.raises(Stopped):
        run(begin(tmp_path / "state"), 20, stop_at=12)
    again = begin(tmp_path / "state")
    assert again.steps == 12
    run(again, 20)
    assert weights(again) == weights(whole)


def test_a_larger_budget_trains_on(tmp_path: Path) -> None:
    run(begin(tmp_path / "state"), 5)
    again = begin(tmp_path / "state")
    run(again, 5)
    assert again.steps == 5
    run(again, 9)
    assert again.steps == 9


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    run(begin(tmp_path / "state", seed=1), 1)
    with pytest.raises(click.ClickException, match="with other options: give those to go on with it, or delete it"):
        begin(tmp_path / "state", seed=2)


@pytest.mark.parametrize(
    ("budget", "spent"),
    [(Budget(minutes=2), 0.25), (Budget(minutes=0.1), 1), (Budget(minutes=2, steps=20), 0.5)],
)
def test_a_budget_is_minutes_or_steps(budget: Budget, spent: float) -> None:
    assert budget.spent(steps=10, seconds=30) == spent
