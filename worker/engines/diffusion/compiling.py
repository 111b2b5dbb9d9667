"""torch.compile for the UNet: faster passes for minutes of compiling, which a folder keeps for the next start."""

import os
from pathlib import Path
from typing import Any, Final

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
SHAPES: Final = 64
"""torch goes back to uncompiled code after so many shapes (by default 8): each number of rows and each size is one."""


def compile_unet(unet: Any) -> Any:
    """The UNet, compiled anew for each number of rows and size when that first comes.

    What was compiled is kept in ``TORCHINDUCTOR_CACHE_DIR``, by default a folder of the user's cache.
    """
    # Importing diffusers makes torch write its own default there, a temporary folder that a new container has not.
    if os.environ.get(VARIABLE) in (None, default_cache_dir()):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[VARIABLE] = str(cache / "img2img" / "inductor")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(unet, dynamic=False)
