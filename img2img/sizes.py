"""The size of a picture from what a request says of it."""

import math
from typing import Final

SIZE_MULTIPLE: Final = 8
MIN_SIDE: Final = 256
MAX_SIDE: Final = 2048


def resolve_size(
    width: int | None, height: int | None, native: tuple[int, int], picture: tuple[int, int] | None
) -> tuple[int, int]:
    """The output's (width, height) in pixels; computed sides are multiples of 8 within 256..2048.

    Both given: those. None given: ``native``, or with an input ``picture`` its aspect ratio at the native pixel count,
    scaled up where a side would fall below 256 so that the picture is not squeezed. One given: the other
    follows the aspect ratio of the picture, or of ``native``.
    """
    if width is not None and height is not None:
        return width, height
    across, down = native if picture is None else picture
    if width is not None:
        return width, _side(width * down / across)
    if height is not None:
        return _side(height * across / down), height
    if picture is None:
        return native
    scale = math.sqrt(native[0] * native[1] / (across * down))
    scale = min(max(scale, MIN_SIDE / min(across, down)), MAX_SIDE / max(across, down))
    return _side(across * scale), _side(down * scale)


def _side(pixels: float) -> int:
    rounded = int(pixels / SIZE_MULTIPLE + 0.5) * SIZE_MULTIPLE
    return min(max(rounded, MIN_SIDE), MAX_SIDE)
