"""The queue's Lua scripts: one file a script, and in front of each the shared parts that it needs."""

from importlib import resources
from typing import Final

SHARED: Final = ("_keys", "_spend", "_service", "_share", "_estimate", "_job", "_route", "_sweep")
"""Each builds on those before it."""
LAST_NEEDED: Final = {
    "report": "_keys",
    "sent": "_spend",
    "upstream_admit": "_keys",
    "upstream_settle": "_keys",
    "stats": "_service",
    "page": "_keys",
    "look": "_estimate",
    "checkpoint": "_job",
    "preview": "_job",
    "submit": "_route",
    "finish": "_job",
    "release": "_job",
    "cancel": "_job",
    "replay": "_route",
    "wait": "_job",
}
"""The last part of it that a script needs, where that is not all: running what it does not need takes time, too."""


def source(name: str) -> str:
    """The text of script ``name`` as it is sent to the server."""
    needed = SHARED[: SHARED.index(LAST_NEEDED.get(name, SHARED[-1])) + 1]
    folder = resources.files(__name__)
    return "\n".join(folder.joinpath(f"{part}.lua").read_text("utf-8") for part in (*needed, name))
