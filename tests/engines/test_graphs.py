"""Passes that are replayed from graphs where that can be, and made as usual where it cannot."""

import pytest
import torch
from structlog.testing import capture_logs

from worker.engines.diffusion.graphs import CAPTURING, HOT, Graphed, free_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures it")
def test_a_shape_that_cannot_be_captured_runs_as_it_is() -> None:
    """Here without a GPU; on one it may lack the memory. It is tried once, not for each pass."""

    def forward(latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return latents * timesteps[:, None, None, None] + embeddings.sum()

    graphed = Graphed(forward)
    inputs = torch.ones(2, 4, 8, 8), torch.full((2,), 3.0), torch.ones(2, 5, 7)
    with capture_logs() as lines:
        results = [graphed(*inputs) for _ in range(HOT + 2)]

    assert all(torch.equal(result, forward(*inputs)) for result in results)
    assert [(line["event"], line["rows"], line["size"]) for line in lines] == [("graph_not_captured", 2, (8, 8))]


def test_memory_is_freed_while_no_other_thread_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch fails it else, and a device that was only full would count as broken."""
    capturing_elsewhere: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: capturing_elsewhere.append(not CAPTURING.locked()))
    free_memory()

    assert capturing_elsewhere == [False]
