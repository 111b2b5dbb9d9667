"""CUDA graphs of the UNet: the hundreds of launches of a pass become one, which small pictures would wait for
otherwise."""

from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog
import torch

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

HOT: Final = 3
"""A shape that has come so often gets a graph."""
MOST: Final = 32
"""Each graph keeps memory of its own."""
WARM_UPS: Final = 3
"""Passes before a capture, in which libraries choose their algorithms; as PyTorch's documentation asks for."""

log = structlog.get_logger(__name__)


class Graphed:
    """``forward`` (latents, timesteps, embeddings to a prediction), replayed from a graph for shapes that come
    often."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._seen: Counter[tuple[torch.Size, torch.Size]] = Counter()
        self._graphs: dict[tuple[torch.Size, torch.Size], _Graph] = {}

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        shape = (latents.shape, embeddings.shape)
        if graph := self._graphs.get(shape):
            return graph.replay(latents, timesteps, embeddings)
        self._seen[shape] += 1
        if self._seen[shape] < HOT or len(self._graphs) >= MOST:
            return self._forward(latents, timesteps, embeddings)
        self._graphs[shape] = graph = _Graph(self._forward, latents, timesteps, embeddings)
        log.info("graph_captured", rows=latents.shape[0], size=tuple(latents.shape[-2:]), graphs=len(self._graphs))
        return graph.replay(latents, timesteps, embeddings)


class _Graph:
    """One captured pass, with the memory that it reads from and writes to."""

    def __init__(self, forward: Forward, *inputs: torch.Tensor) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                forward(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph):
            self._output = forward(*self._inputs)

    def replay(self, *inputs: torch.Tensor) -> torch.Tensor:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._output.clone()
