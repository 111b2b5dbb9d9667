"""The first passes of a model, before anybody waits for one: libraries load, choose algorithms, compile, capture
graphs."""

import torch

from worker.engines.diffusion.batcher import BUCKETS, GUIDED_ROWS, Limits
from worker.engines.diffusion.graphs import HOT
from worker.engines.diffusion.model import VAE_FACTOR, DiffusionModel


def warm_up(model: DiffusionModel, limits: Limits) -> None:
    """Make passes of each prepared number of rows at the model's own size, and decode once. Under inference mode."""
    width, height = (side // VAE_FACTOR for side in model.native_size)
    text = model.encode_text("").embeddings
    buckets = [rows for rows in BUCKETS if rows <= limits.max_rows] if limits.padded else [GUIDED_ROWS]
    for rows in {*buckets, limits.fixed_rows}:
        latents = torch.zeros(rows, 9 if model.is_inpainting else 4, height, width, device=model.device)
        timesteps = torch.zeros(rows, device=model.device)
        for _ in range(HOT if limits.padded else 1):
            model.predict_noise(latents, timesteps, text.expand(rows, -1, -1).contiguous())
    model.decode_latents(torch.zeros(1, 4, height, width, device=model.device))
