"""The queue's Lua scripts: one file a script, ``_lib.lua`` in front of each."""

from importlib import resources


def source(name: str) -> str:
    """The text of script ``name`` as it is sent to the server."""
    folder = resources.files(__name__)
    return "\n".join(folder.joinpath(f"{part}.lua").read_text("utf-8") for part in ("_lib", name))
