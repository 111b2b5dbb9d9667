"""What made a picture, for whoever wants to make it again."""

from typing import Final

import torch
from PIL import Image as PillowImage

from img2img.jobs import Receipt
from worker.engines.diffusion.model import DiffusionModel
from worker.engines.diffusion.samplers import Schedule
from worker.engines.receipts import package_versions, pixels_digest

PACKAGES: Final = ("img2img", "torch", "diffusers", "transformers")


def make_receipt(model: DiffusionModel, schedule: Schedule, picture: PillowImage.Image, rows: int | None) -> Receipt:
    """The receipt of ``picture``; ``rows`` is None unless each pass through the UNet had the same number."""
    return Receipt(
        pixels_sha256=pixels_digest(picture),
        model=model.name,
        revision=model.revision,
        weights=model.weights,
        sampler=schedule.sampler.value,
        steps=len(schedule.steps),
        precision=model.precision,
        device=describe_device(model.device),
        versions=package_versions(*PACKAGES),
        rows=rows,
    )


def describe_device(device: torch.device) -> str:
    """All of a device that its results depend on: the kind of GPU, or the CPU's instructions and threads."""
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
