"""Train the autoencoder that turns 256x256 pictures into 32x32 latents of four channels and back.

    python -m models.autoencoder [--minutes 15]

It sees all drawings in all styles, in crops on all kinds of background, so it needs no training anew for other things.
"""

from pathlib import Path
from typing import Final

import click
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from diffusers import AutoencoderTiny
from rich.console import Console

from models.drawings import SIDE, Drawings, as_tensor, on_background, open_drawings
from models.networks import make_autoencoder, pick_device
from models.options import folder_option, minutes_option, seed_option, steps_option
from models.training import Budget, Part, Training

CROP: Final = 64
STRIDE: Final = 16
COVERAGE: Final = 0.25
"""Share of a crop that a drawing must cover."""
WHITE_SHARE: Final = 0.4
"""Of the crops are on white; the others on a colour drawn by chance."""
RATE: Final = 1.5e-3
BATCH: Final = {"cpu": 32, "cuda": 512}
CHUNK: Final = 256


class Crops:
    """Draws crops of the drawings, on the device, from where the drawings cover enough."""

    def __init__(self, drawings: Drawings, device: torch.device) -> None:
        pictures = as_tensor(drawings.pictures)
        covered = [
            F.avg_pool2d(chunk[:, 3:].float() / 255, CROP, STRIDE).squeeze(1) > COVERAGE
            for chunk in torch.split(pictures, CHUNK)
        ]
        self._places = torch.cat(covered).nonzero().to(device)
        self._pictures = pictures.to(device)
        self._device = device

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Crops (count, 3, 64, 64) in -1..1, mirrored by chance."""
        places = self._places[self._chance(len(self._places), (count,), generator)]
        row = places[:, 0]
        corner = places[:, 1:] * STRIDE + self._chance(STRIDE, (count, 2), generator)
        corner = corner.clamp(max=SIDE - CROP)
        offsets = torch.arange(CROP, device=self._device)
        mirrored = self._chance(2, (count, 2, 1), generator)
        offsets = torch.where(mirrored == 1, CROP - 1 - offsets, offsets)
        y = (corner[:, 0, None] + offsets[:, 0])[:, :, None]
        x = (corner[:, 1, None] + offsets[:, 1])[:, None, :]
        crops = self._pictures[row[:, None, None], :, y, x].permute(0, 3, 1, 2)
        colour = torch.rand((count, 3, 1, 1), generator=generator, device=self._device) * 2 - 1
        white = torch.rand((count, 1, 1, 1), generator=generator, device=self._device) < WHITE_SHARE
        return on_background(crops, torch.where(white, 1.0, colour))

    def _chance(self, limit: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randint(limit, shape, generator=generator, device=self._device)


def reconstruction_loss(pixels: torch.Tensor, decoded: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Distance of colours and of edges, with a slight pull of the latents to nought; drawings live by their edges."""
    error = decoded - pixels
    across = error[..., 1:] - error[..., :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    edges = across.abs().mean() + down.abs().mean()
    return error.abs().mean() + 0.3 * error.square().mean() + 0.5 * edges + 0.001 * latents.square().mean()


def train_autoencoder(drawings: Drawings, folder: Path, start: Path | None, budget: Budget, seed: int) -> Training:
    """Train from ``start`` (a saved autoencoder) or from nothing, and save to ``folder/vae``.

    Raises:
        click.ClickException: the state in ``folder`` is of another training.
    """
    torch.manual_seed(seed)
    device = pick_device()
    network = AutoencoderTiny.from_pretrained(start) if start else make_autoencoder()
    identity = {"start": str(start), "seed": seed, "packages": drawings.packages}
    training = Training({"vae": Part(network, RATE)}, device, seed, folder / "vae.state", identity)
    crops = Crops(drawings, device)
    batch = BATCH[device.type]
    vae = training.networks["vae"]

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        pixels = crops.draw(batch, generator).contiguous(memory_format=torch.channels_last)
        with training.autocast():
            latents = vae.encode(pixels).latents
            decoded = vae.decode(latents).sample
        return reconstruction_loss(pixels, decoded.float(), latents.float())

    training.run("Autoencoder", budget, batch, loss_of)
    training.averages["vae"].save_pretrained(folder / "vae")
    return training


@click.command()
@folder_option
@click.option(
    "--start", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An autoencoder to go on from."
)
@minutes_option(15)
@steps_option
@seed_option
def main(folder: Path, start: Path | None, minutes: float, steps: int | None, seed: int) -> None:
    """Train the autoencoder on all drawings and save it to vae/ in the folder."""
    training = train_autoencoder(open_drawings(folder), folder, start, Budget(minutes, steps), seed)
    Console().print(f"{folder / 'vae'}: {training.steps} steps, loss {training.loss.item():.4f}", highlight=False)


if __name__ == "__main__":
    main()
