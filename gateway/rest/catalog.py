"""What the SDKs' model routes answer: one task, one model."""

from typing import Any, Final

from img2img.schema import INPUT_SCHEMA

MODEL: Final = "@cf/runwayml/stable-diffusion-v1-5-img2img"
AUTHOR: Final = "runwayml"

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
    "properties": [{"property_id": "beta", "value": "true"}],
}
OUTPUT_SCHEMA: Final[dict[str, Any]] = {
    "type": "string",
    "format": "binary",
    "contentType": "image/png",
    "description": "The generated image in PNG format",
}


def search_models(
    *, author: str | None, task: str | None, search: str | None, hide_experimental: bool
) -> list[dict[str, Any]]:
    """The models that match every given filter; the only one is a beta, which counts as experimental."""
    words = f"{CARD['name']} {CARD['description']}".lower()
    matches = (
        (author is None or author.lower() == AUTHOR)
        and (task is None or task.lower() == TASK["name"].lower())
        and (search is None or search.lower() in words)
        and not hide_experimental
    )
    return [CARD] if matches else []


def model_schema() -> dict[str, Any]:
    """Input and output of the model, as JSON Schema."""
    return {"input": INPUT_SCHEMA, "output": OUTPUT_SCHEMA}
