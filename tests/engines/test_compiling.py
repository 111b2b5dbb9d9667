"""A compiled UNet predicts what the plain one does, and what was compiled is there for the next start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A C++ compiler has 40 seconds of work here, of which other processes on the machine make minutes.
pytestmark = pytest.mark.timeout(900)

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
PREDICTS_THE_SAME = """
import sys
import torch
from worker.engines.diffusion.model import open_model

inputs = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.randn(2, 32, 32)
with torch.inference_mode():
    plain, compiled = (
        open_model(sys.argv[1], "cpu", compiled=compiled).predict_noise(*inputs) for compiled in (False, True)
    )
torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
"""
TELLS_THE_FOLDER = """
import os
import torch
from worker.engines.diffusion.compiling import VARIABLE, compile_unet

compile_unet(torch.nn.Identity())
print(os.environ[VARIABLE])
"""


def run(script: str, *arguments: Path, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, env=plain | environment, check=True, stdout=subprocess.PIPE, text=True)
    return ended.stdout.strip()


def test_it_predicts_the_same_and_keeps_what_was_compiled(tiny_4_channel_folder: Path, tmp_path: Path) -> None:
    run(PREDICTS_THE_SAME, tiny_4_channel_folder, XDG_CACHE_HOME=str(tmp_path))

    assert list((tmp_path / "img2img" / "inductor").rglob("*.so"))


def test_a_folder_of_the_users_choice(tmp_path: Path) -> None:
    assert run(TELLS_THE_FOLDER, **{VARIABLE: str(tmp_path)}) == str(tmp_path)
