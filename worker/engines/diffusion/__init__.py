"""The diffusion engine: Stable-Diffusion-1.x-shaped checkpoints, run by torch and diffusers.

engine.py      one thread per engine, bridged to an async iterator
painting.py    one task from prompt to picture, a generator that runs in that thread
inpainting.py  masks: what a UNet of 4 or 9 input channels needs, and putting the original back
pixels.py      Pillow pictures to tensors and back
samplers.py    which timesteps, and the arithmetic of a step
model.py       the networks: text, VAE and UNet, one method each
threads.py     how torch's threads wait for each other
loading.py     finding a checkpoint, checking it, loading it
"""

from worker.engines.diffusion import threads as threads  # isort: split

from worker.engines.diffusion import quiet as quiet
from worker.engines.diffusion.engine import DiffusionEngine

__all__ = ["DiffusionEngine"]
