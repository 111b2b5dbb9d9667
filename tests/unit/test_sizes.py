"""How large a picture becomes."""

import pytest

from img2img.sizes import resolve_size


@pytest.mark.parametrize(
    ("width", "height", "picture", "expected"),
    [
        (512, 768, (100, 100), (512, 768)),
        (None, None, None, (512, 512)),
        (None, None, (100, 100), (512, 512)),
        (None, None, (1600, 1200), (592, 440)),
        (None, None, (1200, 1600), (440, 592)),
        (None, None, (4000, 500), (2048, 256)),
        (None, None, (4000, 100), (2048, 256)),
        (512, None, (1600, 1200), (512, 384)),
        (None, 512, (1600, 1200), (680, 512)),
        (512, None, None, (512, 512)),
        (2048, None, (1000, 100), (2048, 256)),
        (None, 1024, (1000, 100), (2048, 1024)),
    ],
)
def test_sizes(
    width: int | None, height: int | None, picture: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    """What was asked for counts; the rest follows the input picture, or the model's own size."""
    assert resolve_size(width, height, (512, 512), picture) == expected


def test_a_small_model_keeps_the_aspect_ratio_too() -> None:
    """At 256x256 pixels in all, a photograph's short side would fall below 256 and the picture be squeezed."""
    assert resolve_size(None, None, (256, 256), (1600, 1200)) == (344, 256)
    assert resolve_size(None, None, (256, 256), (256, 256)) == (256, 256)
