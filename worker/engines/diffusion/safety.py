"""Stable Diffusion's own safety checker: an image encoder, and seventeen concepts that no picture may be close to."""

from pathlib import Path
from typing import Any, Final

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPConfig

from img2img.errors import ConfigurationError

WEIGHTS: Final = "model.safetensors"
FILES: Final = ("config.json", "preprocessor_config.json", WEIGHTS)
PROCESSORS: Final[Any] = AutoImageProcessor  # untyped
# The published weights have a level that the encoder of today's transformers does not.
NESTED: Final = "vision_model.vision_model."
FLAT: Final = "vision_model."


class DiffusionSafetyChecker:
    """The checkpoint in the folder, or at the hub id, ``source``.

    It runs on the CPU, so that it takes neither memory nor time from an engine on a GPU.

    Raises:
        ConfigurationError: files are missing, or are not such a checkpoint.
    """

    def __init__(self, source: str) -> None:
        folder = _find(source)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            hint = " (a pipeline keeps it in feature_extractor/: copy it)" if missing == [FILES[1]] else ""
            raise _refused(source, f"lacks {missing[0]}{hint}: it must hold {', '.join(FILES)}")
        try:
            self._processor = PROCESSORS.from_pretrained(folder, local_files_only=True)
            self._network: Any = _load(folder, source)
        except ConfigurationError:
            raise
        except Exception as exc:
            # A folder that is not what it says can fail in any of three libraries.
            raise _refused(source, f"cannot be loaded: {exc}") from exc

    def is_unsafe(self, picture: Image.Image) -> bool:
        """See ``SafetyChecker.is_unsafe``."""
        pixels = self._processor(picture, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            # It blackens what it flags: so it gets nothing that anybody will see.
            _, flagged = self._network(clip_input=pixels, images=[torch.zeros(1)])
        return bool(flagged[0])


def _find(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise _refused(
            source, "is no folder here and could not be downloaded: check the path, or the id and the network"
        ) from exc


def _load(folder: Path, source: str) -> Any:
    """The network in float32; every weight comes from the file, none is left as it was drawn."""
    network: Any = StableDiffusionSafetyChecker(CLIPConfig.from_pretrained(folder, local_files_only=True))
    weights = {_flat(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    names = list(network.state_dict())
    missing = [name for name in names if _flat(name) not in weights]
    if missing:
        raise _refused(source, f"lacks weights, such as {missing[0]}: name a Stable Diffusion safety checker")
    network.load_state_dict({name: weights[_flat(name)] for name in names})
    return network.eval()


def _flat(name: str) -> str:
    return FLAT + name.removeprefix(NESTED) if name.startswith(NESTED) else name


def _refused(source: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"IMG2IMG_SAFETY_CHECKER={source} {reason}")
