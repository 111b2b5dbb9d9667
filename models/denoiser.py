"""Train UNet and text encoder on the drawings' latents, and save the checkpoint as a diffusers folder.

python -m models.denoiser [--things 36] [--styles twemoji] [--minutes 90] [--size small | --start FOLDER]
"""

from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import torch
from diffusers import AutoencoderTiny, DDPMScheduler
from rich.console import Console

from models.captions import captions_of, encode, learn_tokenizer
from models.checkpoint import NOISE, Parts, load_parts, save_checkpoint
from models.drawings import Drawings, open_drawings
from models.latents import VARIANTS, encode_drawings
from models.networks import SIZES, describe, make_text_encoder, make_unet, pick_device
from models.options import folder_option, minutes_option, seed_option, steps_option, styles_option, things_option
from models.painter import Painter
from models.training import Budget, Part, Training

UNCONDITIONAL: Final = 0.1
"""Share of the samples without a caption, which guidance needs."""
SNR_LIMIT: Final = 5.0
"""Min-SNR weighting: noise that hardly hides the picture counts less, so that shapes come before their edges."""
BATCH: Final = {"cpu": 16, "cuda": 512}
RATE, LARGE_RATE = 1e-3, 5e-4
"""Of a UNet, and of one with more than ``LARGE`` parameters; the text encoder's is twice that."""
LARGE: Final = 25_000_000


class Plan(NamedTuple):
    """What to train, from ``start`` or, where that is None, from nothing in a ``size``."""

    things: int | None
    styles: tuple[str, ...]
    size: str
    start: Path | None
    seed: int


class Samples:
    """Draws training samples on the device: noisy latents, their noise, timestep and caption."""

    def __init__(self, latents: torch.Tensor, captions: torch.Tensor, empty: torch.Tensor) -> None:
        """``latents`` (N, V, 4, 32, 32) are scaled; ``captions`` (N, C, window); ``empty`` (window,)."""
        self._latents = latents
        self._captions = captions
        self._empty = empty
        schedule: Any = DDPMScheduler(**NOISE)
        self._kept: torch.Tensor = schedule.alphas_cumprod.to(latents.device)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``count`` samples: ``noisy``, ``noise``, ``timesteps``, ``ids`` and the loss's ``weights``."""
        device = self._latents.device

        def chance(limit: int) -> torch.Tensor:
            return torch.randint(limit, (count,), generator=generator, device=device)

        rows = chance(len(self._latents))
        latents = self._latents[rows, chance(VARIANTS)].float()
        ids = self._captions[rows, chance(self._captions.shape[1])]
        dropped = torch.rand((count, 1), generator=generator, device=device) < UNCONDITIONAL
        timesteps = chance(len(self._kept))
        kept = self._kept[timesteps]
        noise = torch.randn(latents.shape, generator=generator, device=device)
        square = kept[:, None, None, None]
        snr = kept / (1 - kept)
        return {
            "noisy": square.sqrt() * latents + (1 - square).sqrt() * noise,
            "noise": noise,
            "timesteps": timesteps,
            "ids": torch.where(dropped, self._empty, ids),
            "weights": snr.clamp(max=SNR_LIMIT) / snr,
        }


def first_parts(plan: Plan, folder: Path, drawings: Drawings) -> Parts:
    """The parts of ``plan.start``, or new ones around the autoencoder in ``folder``.

    Raises:
        click.ClickException: there is no autoencoder yet.
    """
    if plan.start:
        return load_parts(plan.start)
    if not (folder / "vae" / "config.json").exists():
        raise click.ClickException(f"{folder} has no autoencoder: run python -m models.autoencoder first")
    torch.manual_seed(plan.seed)
    tokenizer = learn_tokenizer(drawings)
    text_encoder, unet = make_text_encoder(plan.size, tokenizer), make_unet(plan.size)
    return Parts(AutoencoderTiny.from_pretrained(folder / "vae"), text_encoder, tokenizer, unet)


def make_samples(drawings: Drawings, parts: Parts, device: torch.device, plan: Plan) -> Samples:
    """The drawings' latents and captions; an autoencoder that is new here is given its scaling factor."""
    latents = encode_drawings(drawings, parts.vae, device, plan.seed)
    if plan.start is None:
        parts.vae.register_to_config(scaling_factor=1 / latents.float().std().item())
    captions = torch.stack([encode(parts.tokenizer, captions_of(label)) for label in drawings.labels])
    empty = encode(parts.tokenizer, [""])[0]
    return Samples(latents * parts.vae.config.scaling_factor, captions.to(device), empty.to(device))


def train_denoiser(plan: Plan, folder: Path, output: Path, budget: Budget) -> Training:
    """Train by ``plan`` with drawings and autoencoder of ``folder``, and save the checkpoint to ``output``.

    Raises:
        click.ClickException: something is missing, or the state beside ``output`` is of another training.
    """
    everything = open_drawings(folder)
    drawings = everything.choose(plan.things, plan.styles)
    device = pick_device()
    parts = first_parts(plan, folder, everything)
    rate = RATE if parts.unet.num_parameters() < LARGE else LARGE_RATE
    networks = {"unet": Part(parts.unet, rate), "text_encoder": Part(parts.text_encoder, 2 * rate)}
    identity = {**_plain(plan), "names": drawings.names, "packages": drawings.packages}
    training = Training(networks, device, plan.seed, output.with_name(f"{output.name}.state"), identity)
    samples = make_samples(drawings, parts, device, plan)
    batch = BATCH[device.type]
    unet, text_encoder = (training.networks[name] for name in networks)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        sample = samples.draw(batch, generator)
        with training.autocast():
            states = text_encoder(sample["ids"]).last_hidden_state
            predicted = unet(sample["noisy"], sample["timesteps"], states).sample
        errors = (predicted.float() - sample["noise"]).square().mean((1, 2, 3))
        weighted: torch.Tensor = (errors * sample["weights"]).mean()
        return weighted

    training.run("UNet and text encoder", budget, batch, loss_of)
    averaged = parts._replace(**training.averages)
    shown = "lion" if "lion" in drawings.names else drawings.names[0]
    save_checkpoint(averaged, output, drawings, shown, _history(plan, training, batch * training.steps))
    Painter(output).paint_examples(shown).save(output / "examples.png")
    return training


def _plain(plan: Plan) -> dict[str, Any]:
    return {**plan._asdict(), "styles": list(plan.styles), "start": plan.start and str(plan.start)}


def _history(plan: Plan, training: Training, samples: int) -> str:
    origin = f"Began from {plan.start.name}" if plan.start else f"Began from nothing (size {plan.size})"
    return (
        f"{origin}, seed {plan.seed}: {samples:,} samples in {training.seconds / 60:.0f} minutes on "
        f"{describe(training.device)}, last loss {training.loss.item():.4f}."
    )


@click.command()
@folder_option
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The checkpoint's folder.  [default: emoji-sd in the folder]",
)
@things_option("36")
@styles_option("twemoji")
@click.option(
    "--size",
    type=click.Choice(list(SIZES)),
    default="small",
    show_default=True,
    help="Of new networks: small for two CPU cores, base for a GPU. Those of --start keep theirs.",
)
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkpoint to go on from, with its autoencoder, tokenizer and size.",
)
@minutes_option(90)
@steps_option
@seed_option
def main(
    folder: Path,
    output: Path | None,
    minutes: float,
    steps: int | None,
    **plan: Any,
) -> None:
    """Train UNet and text encoder on the drawings and save the checkpoint as a diffusers folder."""
    output = output or folder / "emoji-sd"
    training = train_denoiser(Plan(**plan), folder, output, Budget(minutes, steps))
    Console().print(f"{output}: {training.steps} steps, loss {training.loss.item():.4f}", highlight=False)


if __name__ == "__main__":
    main()
