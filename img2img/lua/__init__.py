"""The queue's Lua scripts: one file a script, and the parts that all of them share in front of each."""

from importlib import resources
from typing import Final

SHARED: Final = ("_keys", "_service", "_share", "_estimate", "_job", "_sweep")


def source(name: str) -> str:
    """The text of script ``name`` as it is sent to the server."""
    folder = resources.files(__name__)
    return "\n".join(folder.joinpath(f"{part}.lua").read_text("utf-8") for part in (*SHARED, name))
