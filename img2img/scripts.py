"""Runs a queue's Lua scripts: each in a trip of its own, or those of which many are under way at once together."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from arq.connections import ArqRedis
from redis.exceptions import NoScriptError, ReadOnlyError

from img2img import lua
from img2img.errors import Unavailable
from img2img.server import translated
from img2img.trips import SharedTrips

SCRIPTS: Final = (
    "submit", "claim", "beat", "report", "checkpoint", "preview", "sent", "finish", "release", "cancel", "replay",
    "page", "look", "wait", "leave", "sweep", "sign_off", "stats",
)  # fmt: skip
SHARING: Final = ("submit", "finish")
"""Those of them of which many are under way at once."""
REPEATS: Final = (0.02, 0.1, 0.5, 0.0)
"""Pauses in seconds after tries that a server refused which is about to be replaced."""


class Scripts:
    """The scripts of the queue ``name`` under ``prefix``. Every method raises ``Unavailable`` as the queue does."""

    def __init__(self, redis: ArqRedis, prefix: str, name: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._name = name
        self._scripts = {script: redis.register_script(lua.source(script)) for script in SCRIPTS}
        self._trips = {script: SharedTrips(partial(self._run_all, script)) for script in SHARING}

    async def run(self, script: str, *arguments: Any) -> Any:
        """The script's answer."""
        with translated():
            return await self._scripts[script](keys=[self._prefix], args=[self._name, *arguments])

    async def run_with_others(self, script: str, *arguments: Any) -> Any:
        """The same for one of ``SHARING``, in a trip that it may share with other calls."""
        return await self._trips[script].call(*arguments)

    async def _run_all(self, script: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """One script for several sets of arguments, in one trip; an error of one is its answer. Safe to repeat only."""
        known = self._scripts[script]
        answers: list[Any] = []
        with translated():
            for pause in REPEATS:
                async with self._redis.pipeline(transaction=False) as pipe:
                    for arguments in calls:
                        pipe.evalsha(known.sha, 1, self._prefix, self._name, *arguments)
                    answers = await pipe.execute(raise_on_error=False)
                if any(isinstance(answer, NoScriptError) for answer in answers):
                    await self._redis.script_load(known.script)
                elif any(isinstance(answer, ReadOnlyError) for answer in answers):
                    # This server is no master any more: let the next connection find the one that is.
                    await self._redis.connection_pool.disconnect(inuse_connections=False)
                    await asyncio.sleep(pause)
                else:
                    break
        return [_unavailable(answer) if isinstance(answer, Exception) else answer for answer in answers]


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"The queue server does not answer as it should ({type(error).__name__}): try again")
