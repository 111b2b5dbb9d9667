"""Programs that the dev extra brings: beside the interpreter, whatever PATH says."""

import sys
from pathlib import Path


def tool(name: str) -> str:
    found = Path(sys.executable).with_name(name)
    assert found.exists(), f"{name} is missing: make setup"
    return str(found)
