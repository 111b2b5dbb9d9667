"""Finding a checkpoint, checking it, and loading it: a folder, a single file, a hub id or the bundled one.

Only safetensors are read. A pickle (``.ckpt``, ``.bin``, ``.pt``) runs any code its author put in, so it is
refused before it is opened.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from img2img.errors import ConfigurationError
from worker.engines.diffusion.samplers import PREDICTIONS

BUNDLED: Final = Path(__file__).parents[2] / "models"
SD15: Final = Path(__file__).parent / "sd15"
HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
HUB_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
"""The hub's client puts what it downloads into a folder of that name."""
PICKLES: Final = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
NETWORKS: Final = ("text_encoder", "unet", "vae")
HUB_FILES: Final = (
    "model_index.json",
    *(f"{folder}/*.json" for folder in (*NETWORKS, "scheduler", "tokenizer")),
    "tokenizer/*.txt",
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
# One tensor of each network in a file of the original (ldm) layout; the first also tells the input channels.
UNET_INPUT: Final = "model.diffusion_model.input_blocks.0.0.weight"
SINGLE_FILE_TENSORS: Final = (
    UNET_INPUT,
    "first_stage_model.decoder.conv_in.weight",
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
)


class Checkpoint(NamedTuple):
    """The parts of a checkpoint, on the CPU; diffusers' networks are untyped.

    ``weights`` are SHA-256 by network (of a single file: ``checkpoint``); ``revision`` is the hub's commit, or a digest
    of the weights.
    """

    name: str
    revision: str
    weights: dict[str, str]
    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]


def load_checkpoint(source: str) -> Checkpoint:
    """Load what ``IMG2IMG_MODEL`` names: a bundled name, a diffusers folder, a file or a hub id.

    The network is used only for a hub id. Every weight file with a ``<file>.sha256`` beside it is checked.

    Raises:
        ConfigurationError: nothing there, pickled or damaged weights, or no Stable Diffusion 1.x shape.
    """
    path, name = _locate(source)
    try:
        checkpoint = _load_file(path, source) if path.is_file() else _load_folder(path, name, source)
        _check_shape(checkpoint, source)
    except ConfigurationError:
        raise
    except Exception as exc:
        # A folder or file that is not what it says can fail in any of four libraries.
        raise _refused(source, f"cannot be loaded: {exc}") from exc
    return checkpoint


def _locate(source: str) -> tuple[Path, str]:
    """The local folder or file that ``source`` means and its short name; a hub id is downloaded first."""
    if "/" not in source and (BUNDLED / source / "model_index.json").is_file():
        return BUNDLED / source, source
    path = Path(source).expanduser()
    if path.suffix in PICKLES:
        raise _pickled(source, path.name)
    if path.is_file() and path.suffix != ".safetensors":
        raise _refused(source, "is not a .safetensors file")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise _refused(source, "has no model_index.json: name a folder that diffusers saved a pipeline to")
    if path.exists():
        return path, path.resolve().name
    if HUB_ID.fullmatch(source) and path.suffix != ".safetensors":
        return _download(source), source
    raise _refused(
        source,
        "does not exist: name a diffusers folder, a .safetensors file, a hub id (org/name) or emoji-sd",
    )


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise _refused(
            hub_id, "is no path here and could not be downloaded: check the id and the network, or HF_TOKEN"
        ) from exc


def _load_folder(folder: Path, name: str, source: str) -> Checkpoint:
    index = json.loads((folder / "model_index.json").read_text())
    vae = AutoencoderTiny if index["vae"][1] == "AutoencoderTiny" else AutoencoderKL
    weights = {network: _check_weights(folder / network, source) for network in NETWORKS}
    return Checkpoint(
        name=name,
        revision=folder.name if HUB_COMMIT.fullmatch(folder.name) else _revision(weights),
        weights=weights,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        text_encoder=_load_network(CLIPTextModel, folder / "text_encoder", source),
        # Without accelerate, diffusers would only warn that it cannot load the frugal way.
        unet=_load_network(UNet2DConditionModel, folder / "unet", source, low_cpu_mem_usage=False),
        vae=_load_network(vae, folder / "vae", source, low_cpu_mem_usage=False),
        scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
    )


def _load_network(kind: Any, folder: Path, source: str, **options: Any) -> Any:
    """Load one network; the libraries would fill weights that are missing with random numbers."""
    network, report = kind.from_pretrained(
        folder,
        variant=_variant(folder),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if report["missing_keys"]:
        raise _refused(source, f"lacks weights in {folder.name}/, such as {min(report['missing_keys'])}")
    return network


def _load_file(path: Path, source: str) -> Checkpoint:
    """Load a file of the original layout; its configuration and tokenizer come from a folder.

    That folder is ``<stem>/`` or ``config/`` beside the file, else Stable Diffusion 1.5's, which the package
    carries. diffusers would fetch it from the hub even with ``local_files_only``.
    """
    digest = _check_digest(path, source)
    with safe_open(path, framework="pt") as tensors:
        missing = [name for name in SINGLE_FILE_TENSORS if name not in tensors.keys()]  # noqa: SIM118
        if missing:
            raise _refused(
                source,
                f"lacks {missing[0]}: name a Stable Diffusion 1.x file that holds text encoder, UNet and "
                "VAE in one file, or a diffusers folder",
            )
        in_channels = tensors.get_slice(UNET_INPUT).get_shape()[1]
    beside = (path.with_suffix(""), path.parent / "config")
    config = next((folder for folder in beside if (folder / "model_index.json").is_file()), SD15)
    unet = UNet2DConditionModel.from_single_file(
        str(path),
        config=str(config),
        subfolder="unet",
        in_channels=in_channels,
        local_files_only=True,
        low_cpu_mem_usage=False,
    )
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(config), unet=unet, safety_checker=None, local_files_only=True
    )
    return Checkpoint(
        name=path.stem,
        revision=_revision({"checkpoint": digest}),
        weights={"checkpoint": digest},
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        unet=unet,
        vae=pipeline.vae,
        scheduler_config=dict(pipeline.scheduler.config),
    )


def _check_weights(folder: Path, source: str) -> str:
    """Check a network's weight files; answers with the SHA-256 of those that are loaded."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        if pickles:
            raise _pickled(source, f"{folder.name}/{pickles[0]}")
        raise _refused(source, f"has no weights in {folder.name}/: a .safetensors file belongs there")
    digests = {path: _check_digest(path, source) for path in weights}
    variant = _variant(folder)
    loaded = [digest for path, digest in digests.items() if (".fp16." in path.name) == (variant == "fp16")]
    return loaded[0] if len(loaded) == 1 else hashlib.sha256("".join(loaded).encode()).hexdigest()


def _variant(folder: Path) -> str | None:
    """The variant of a network's weights to load: None, or "fp16" where there is no other."""
    return "fp16" if all(".fp16." in path.name for path in folder.glob("*.safetensors")) else None


def _check_digest(path: Path, source: str) -> str:
    """The SHA-256 of ``path``, which must be that in ``<path>.sha256`` (the digest, or sha256sum's line), if there."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    sidecar = path.with_name(f"{path.name}.sha256")
    if sidecar.is_file() and sidecar.read_text().split()[:1] != [actual]:
        raise _refused(source, f"does not match {sidecar.name}: fetch it again, its SHA-256 is {actual}")
    return actual


def _revision(weights: dict[str, str]) -> str:
    """A short name for weights that have no commit."""
    return hashlib.sha256("".join(weights[network] for network in sorted(weights)).encode()).hexdigest()[:12]


def _check_shape(checkpoint: Checkpoint, source: str) -> None:
    """Refuse what loads but is another family of models (SDXL, SD 2, LCM)."""
    unet, vae = checkpoint.unet.config, checkpoint.vae.config
    width = checkpoint.text_encoder.config.hidden_size
    sound = (
        unet.in_channels in (4, 9)
        and unet.cross_attention_dim == width
        and unet.addition_embed_type is None
        and unet.time_cond_proj_dim is None
        and vae.latent_channels == 4
        and len(vae.block_out_channels) == 4
    )
    if not sound:
        raise _refused(
            source,
            f"is not shaped like Stable Diffusion 1.x (UNet with {unet.in_channels} input channels and "
            f"{unet.cross_attention_dim} text features, text encoder with {width}): name such a model",
        )
    predicts = checkpoint.scheduler_config.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        raise _refused(source, f"predicts {predicts!r}: name a model that predicts {', '.join(PREDICTIONS)}")


def _pickled(source: str, name: str) -> ConfigurationError:
    return _refused(source, f"has pickled weights ({name}), which can run code: convert them to safetensors")


def _refused(source: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"IMG2IMG_MODEL={source} {reason}")
