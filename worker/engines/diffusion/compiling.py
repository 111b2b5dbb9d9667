"""torch.compile for the UNet: faster passes for minutes of compiling, which a folder keeps for the next start."""

import os
from pathlib import Path
from typing import Any, Final

import torch

SHAPES: Final = 64
"""torch goes back to uncompiled code after so many shapes (by default 8): each number of rows and each size is one."""


def compile_unet(unet: Any) -> Any:
    """The UNet, compiled anew for each number of rows and size when that first comes.

    What was compiled is kept in ``TORCHINDUCTOR_CACHE_DIR``, by default a folder of the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "img2img" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(unet, dynamic=False)
