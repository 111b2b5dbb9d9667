"""A compiled UNet predicts what the plain one does, and what was compiled is there for the next start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from worker.engines.diffusion.compiling import VARIABLE, compile_unet

SCRIPT = """
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


def run(model: Path, **environment: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name != VARIABLE}
    subprocess.run([sys.executable, "-c", SCRIPT, model], env=plain | environment, check=True, timeout=150)


def test_it_predicts_the_same_and_keeps_what_was_compiled(tiny_4_channel_folder: Path, tmp_path: Path) -> None:
    run(tiny_4_channel_folder, XDG_CACHE_HOME=str(tmp_path))

    assert list((tmp_path / "img2img" / "inductor").rglob("*.so"))


def test_a_folder_of_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    compile_unet(torch.nn.Identity())

    assert os.environ[VARIABLE] == str(tmp_path)
