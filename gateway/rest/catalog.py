"""What the SDKs' model routes answer: one task, Cloudflare's model, and those of the pools file."""

from collections.abc import Sequence
from typing import Any, Final
from uuid import NAMESPACE_URL, uuid5

from img2img.schema import INPUT_SCHEMA, MODEL

BETA: Final = {"property_id": "beta", "value": "true"}

TASK: Final[dict[str, Any]] = {
    "id": "3d6e1f35-341b-4915-a6c8-9a7142a9033a",
    "name": "Text-to-Image",
    "description": (
        "Generates images from input text. "
        "These models can be used to generate and modify images based on text prompts."
    ),
}
CARD: Final[dict[str, Any]] = {
    "id": "19547f04-7a6a-4f87-bf2c-f5e32fb12dc5",
    "source": 1,
    "name": MODEL,
    "description": (
        "Stable Diffusion is a latent text-to-image diffusion model capable of generating photo-realistic images. "
        "Img2img generate a new image from an input image with Stable Diffusion."
    ),
    "task": TASK,
    "tags": [],
    "properties": [BETA],
}
OUTPUT_SCHEMA: Final[dict[str, Any]] = {
    "type": "string",
    "format": "binary",
    "contentType": "image/png",
    "description": "The generated image in PNG format",
}


def search_models(
    models: Sequence[str], *, author: str | None, task: str | None, search: str | None, hide_experimental: bool
) -> list[dict[str, Any]]:
    """The cards of Cloudflare's model and of ``models`` that match every given filter; betas count as experimental."""
    cards = [CARD, *(_card(name) for name in models if name != MODEL)]
    return [
        card
        for card in cards
        if (author is None or author.lower() == _author(card["name"]).lower())
        and (task is None or task.lower() == TASK["name"].lower())
        and (search is None or search.lower() in f"{card['name']} {card['description']}".lower())
        and not (hide_experimental and BETA in card["properties"])
    ]


def model_schema() -> dict[str, Any]:
    """Input and output of every model, as JSON Schema."""
    return {"input": INPUT_SCHEMA, "output": OUTPUT_SCHEMA}


def _card(name: str) -> dict[str, Any]:
    """The card of a model of which only the name is known."""
    return {
        "id": str(uuid5(NAMESPACE_URL, name)),
        "source": 1,
        "name": name,
        "description": f"{name}, as this service has it.",
        "task": TASK,
        "tags": [],
        "properties": [],
    }


def _author(name: str) -> str:
    """``runwayml`` of ``@cf/runwayml/model``; empty where a name has none."""
    return name.rpartition("/")[0].rpartition("/")[2]
