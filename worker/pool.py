"""What the pools file decides for a worker: its engine and its model."""

from pathlib import Path

import msgspec

from img2img.errors import ConfigurationError
from img2img.pools import Pool, Pools
from img2img.settings import BUNDLED_MODEL, Settings


def settings_of_worker(settings: Settings) -> Settings:
    """The settings with engine and model of the worker's pool; without a pools file they stay as they are.

    An engine ``auto`` and the bundled model count as not given: only what says something else can contradict the file.

    Raises:
        ConfigurationError: the file is wrong, IMG2IMG_QUEUE is none of its pools, or a setting contradicts it.
    """
    if settings.pools_file is None:
        return settings
    path = settings.pools_file
    pools = Pools.load(path).by_name
    pool = pools.get(settings.queue)
    if pool is None:
        raise ConfigurationError(
            f"IMG2IMG_QUEUE is {settings.queue!r}, which is no pool of {path}: set it to {' or '.join(pools)}"
        )
    if settings.engine not in ("auto", pool.engine):
        raise _contradiction("IMG2IMG_ENGINE", settings.engine, path, pool, "engine", pool.engine)
    if pool.model is not None and settings.model not in (BUNDLED_MODEL, pool.model):
        raise _contradiction("IMG2IMG_MODEL", settings.model, path, pool, "model", pool.model)
    return msgspec.structs.replace(settings, engine=pool.engine, model=pool.model or settings.model)


def _contradiction(variable: str, given: str, path: Path, pool: Pool, field: str, value: str) -> ConfigurationError:
    return ConfigurationError(
        f"{variable} is {given!r}, and the {field} of pool {pool.name!r} in {path} is {value!r}: "
        f"unset {variable}, or change the file"
    )
