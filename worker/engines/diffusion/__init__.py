"""The diffusion engine: Stable-Diffusion-1.x-shaped checkpoints, run by torch and diffusers, many jobs in one pass.

engine.py       lanes, one a device, bridged to an async iterator a job
lane.py         a device's thread: take in, let go, what jobs need alone, a step of a batch
batcher.py      which jobs take the next step together: policy, without tensors
painting.py     one job from prompt to picture, but for its steps: a generator that runs in the lane
sampling.py     one step of many jobs: gather rows, one pass, one update
samplers.py     the numbers of that update: timesteps and factors for each sampler
inpainting.py   masks: what a UNet of 4 or 9 input channels needs, and putting the original back
checkpoints.py  a job's state between two steps
previews.py     small pictures of what a job has so far
receipts.py     what made a picture
safety.py       a check of finished pictures, on the CPU
pixels.py       Pillow pictures to tensors and back
model.py        the networks: text, VAE and UNet, one method each
graphs.py, compiling.py, warmup.py  what makes passes fast, before they are waited for
threads.py      how many threads torch has, and how they wait for each other
loading.py      finding a checkpoint, checking it, loading it
"""

from worker.engines.diffusion import threads as threads  # isort: split

from worker.engines.diffusion import quiet as quiet
from worker.engines.diffusion.engine import DiffusionEngine, EngineOptions
from worker.engines.diffusion.lane import Intervals

__all__ = ["DiffusionEngine", "EngineOptions", "Intervals"]
