"""CUDA graphs of the UNet: the hundreds of launches of a pass become one, which small pictures would wait for
otherwise."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import structlog
import torch

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Shape = tuple[torch.Size, torch.Size]

HOT: Final = 3
"""A shape that has come so often gets a graph."""
MOST: Final = 32
"""Each graph keeps its inputs and its output."""
WARM_UPS: Final = 3
"""Passes before a capture, in which libraries choose their algorithms; as PyTorch's documentation asks for."""
CAPTURING: Final = threading.Lock()
"""Freeing memory, with which a capture begins, is done on every device: torch refuses it while another one captures."""

log = structlog.get_logger(__name__)


def free_memory() -> None:
    """Give back what torch keeps of the devices' memory and does not use, once no other thread captures a graph."""
    with CAPTURING:
        torch.cuda.empty_cache()


class Graphed:
    """``forward`` (latents, timesteps, embeddings to a prediction), replayed from a graph for shapes that come
    often.

    One thread calls it, whose current device is the inputs'. A shape that cannot be captured runs as it is.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, _Graph | None] = {}
        self._room: _Room | None = None

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        shape = (latents.shape, embeddings.shape)
        if shape not in self._graphs:
            self._seen[shape] += 1
            if self._seen[shape] < HOT or len(self._graphs) >= MOST:
                return self._forward(latents, timesteps, embeddings)
            self._graphs[shape] = self._capture(latents, timesteps, embeddings)
        graph = self._graphs[shape]
        if graph is None:
            return self._forward(latents, timesteps, embeddings)
        return graph.replay(latents, timesteps, embeddings)

    def _capture(self, *inputs: torch.Tensor) -> "_Graph | None":
        """The graph of that shape, or None: most often for want of memory, with which a pass may still do."""
        latents = inputs[0]
        shape = {"rows": latents.shape[0], "size": tuple(latents.shape[-2:])}
        try:
            if self._room is None:
                stream = torch.cuda.Stream(latents.device)  # type: ignore[no-untyped-call]
                self._room = _Room(stream, torch.cuda.graph_pool_handle())
            with CAPTURING:
                graph = _Graph(self._forward, self._room, *inputs)
        except RuntimeError as exc:
            log.warning("graph_not_captured", **shape, error=str(exc))
            return None
        log.info("graph_captured", **shape, graphs=len(self._graphs) + 1)
        return graph


class _Room(NamedTuple):
    """Where the graphs of one device are captured, and the memory that they share.

    They can, because they run one after another, and each one's output is copied before the next runs.
    """

    stream: torch.cuda.Stream
    pool: Any


class _Graph:
    """One captured pass, with the memory that it reads from and writes to."""

    def __init__(self, forward: Forward, room: _Room, *inputs: torch.Tensor) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        usual = torch.cuda.current_stream(inputs[0].device)
        room.stream.wait_stream(usual)
        # Also around the capture, which would leave its stream in use if it failed.
        with torch.cuda.stream(room.stream):
            for _ in range(WARM_UPS):
                forward(*self._inputs)
            # Threads of other devices go on meanwhile, and may allocate.
            with torch.cuda.graph(self._graph, room.pool, room.stream, capture_error_mode="thread_local"):
                self._output = forward(*self._inputs)
        usual.wait_stream(room.stream)

    def replay(self, *inputs: torch.Tensor) -> torch.Tensor:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._output.clone()
