"""The first passes of a model, before anybody waits for one: libraries load, choose algorithms, compile, capture
graphs."""

import torch

from worker.engines.diffusion.batcher import BUCKETS, GUIDED_ROWS, Limits
from worker.engines.diffusion.graphs import HOT
from worker.engines.diffusion.model import VAE_FACTOR, DiffusionModel


def places_agree(model: DiffusionModel, rows: int) -> bool:
    """Whether a row's bits are the same at each place of a pass of ``rows`` rows at the model's own size. Under
    inference mode.

    Libraries split a pass among threads or blocks: where a split falls within a row, that row is rounded differently.
    On two CPU cores it does in passes of 3 and 6 rows, and does not in those of 2, 4 and 8.
    """
    width, height = (side // VAE_FACTOR for side in model.native_size)
    channels = 9 if model.is_inpainting else 4
    text = model.encode_text("").embeddings
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, channels, height, width, generator=generator).to(model.device)
    results = []
    for place in range(rows):
        latents = torch.randn(rows, channels, height, width, generator=generator).to(model.device)
        latents[place] = row[0]
        timesteps = torch.full((rows,), 500.0, device=model.device)
        results.append(model.predict_noise(latents, timesteps, text.expand(rows, -1, -1).contiguous())[place])
    return all(torch.equal(result, results[0]) for result in results)


def warm_up(model: DiffusionModel, limits: Limits) -> None:
    """Make passes of each prepared number of rows at the model's own size, and decode once. Under inference mode."""
    width, height = (side // VAE_FACTOR for side in model.native_size)
    text = model.encode_text("").embeddings
    buckets = [rows for rows in BUCKETS if rows <= limits.max_rows] if limits.padded else [GUIDED_ROWS]
    # The largest first: its graph's memory then serves those of all others.
    for rows in sorted({*buckets, limits.fixed_rows}, reverse=True):
        latents = torch.zeros(rows, 9 if model.is_inpainting else 4, height, width, device=model.device)
        timesteps = torch.zeros(rows, device=model.device)
        for _ in range(HOT if limits.padded else 1):
            model.predict_noise(latents, timesteps, text.expand(rows, -1, -1).contiguous())
    model.decode_latents(torch.zeros(1, 4, height, width, device=model.device))
