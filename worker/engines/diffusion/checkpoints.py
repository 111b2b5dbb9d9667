"""The state of a task between two steps, to go on from elsewhere: its latents, and what the next step remembers.

All else (noise, the input's latents, the mask) is computed again from the task, by the same random numbers. Under a
fixed number of rows the picture is the same to the last bit, on the same kind of device and the same versions.
"""

import hashlib

import msgspec
import structlog
import torch

from worker.engines.base import Checkpoint, Task
from worker.engines.diffusion.model import DiffusionModel
from worker.engines.diffusion.sampling import Sampling

log = structlog.get_logger(__name__)


class State(msgspec.Struct, frozen=True):
    """float32 tensors (4, h, w) as bytes, in the machine's order; ``made_for`` tells of which task and model."""

    made_for: bytes
    latents: bytes
    clean: bytes | None


def save(sampling: Sampling, task: Task, model: DiffusionModel) -> Checkpoint:
    """The sampling's state after the steps that are done."""
    clean = sampling.clean if sampling.schedule.remembers else None
    state = State(_identity(task, model), _bytes_of(sampling.latents), None if clean is None else _bytes_of(clean))
    return Checkpoint(sampling.step, sampling.steps, msgspec.msgpack.encode(state))


def restore(sampling: Sampling, checkpoint: Checkpoint, task: Task, model: DiffusionModel) -> None:
    """Go on from ``checkpoint``, unless it is of another task, model or release: then all steps are taken."""
    try:
        state = msgspec.msgpack.decode(checkpoint.data, type=State)
    except msgspec.MsgspecError:
        log.warning("checkpoint_unreadable")
        return
    fits = len(state.latents) == sampling.latents.nbytes and 0 < checkpoint.step <= sampling.steps
    if state.made_for != _identity(task, model) or not fits:
        log.warning("checkpoint_of_something_else", step=checkpoint.step)
        return
    sampling.step = checkpoint.step
    sampling.latents = _tensor_like(sampling.latents, state.latents)
    sampling.clean = None if state.clean is None else _tensor_like(sampling.latents, state.clean)


def _identity(task: Task, model: DiffusionModel) -> bytes:
    """A digest of all that the latents depend on but the input's pixels, which belong to the job."""
    asked = msgspec.structs.asdict(task)
    for name in ("previews", "deadline"):
        del asked[name]
    return hashlib.sha256(msgspec.msgpack.encode([asked, model.revision, model.precision])).digest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()


def _tensor_like(tensor: torch.Tensor, data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(tensor.shape).to(tensor.device)
