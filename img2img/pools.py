"""Pools and routes: which queues there are, what their workers can do, and in what order a job may go to them.

One TOML file, which gateways and workers read at their start (docs/pools.md):

    [[pools]]
    name = "gpu"                  # a queue; its workers have IMG2IMG_QUEUE=gpu
    engine = "diffusion"

    [[pools]]
    name = "burst"
    engine = "cloudflare"
    step_price = 0.0001           # in any currency, per step at 512x512
    tenant_spend_per_day = 5.0

    [[routes]]
    pools = ["gpu", "burst"]      # the first one first
    max_wait = 20.0
"""

import math
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import msgspec

from img2img.errors import ConfigurationError
from img2img.requests import MODEL_NAME, MODEL_NAME_RULE, JobOptions, Parameters
from img2img.schema import MODEL
from img2img.sizes import resolve_size
from img2img.toml_files import read_toml

NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
PRICED_SIZE: Final = (512, 512)
PRICED_PIXELS: Final = 512 * 512
REMEDY: Final = "see docs/pools.md"

PoolEngine = Literal["diffusion", "cloudflare", "fake"]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Limit = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=24 * 3600)]


class RequestClass(StrEnum):
    """What a request asks for, by the pictures that come with it."""

    TEXT_TO_IMAGE = "text-to-image"
    IMAGE_TO_IMAGE = "image-to-image"
    INPAINTING = "inpainting"


LACKS: Final[dict[str, dict[str, str]]] = {
    "cloudflare": {
        "reproducible": "the upstream promises no picture again",
        "previews": "the upstream shows nothing before the end",
    }
}
"""Options of a job that an engine cannot fulfil, and why."""


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A queue whose workers are alike: one ``engine`` with one ``model``.

    ``external``: its pictures are made outside; True for cloudflare unless the file says otherwise. ``max_steps`` and
    ``max_pixels`` bound a job, ``max_queued`` how many wait. A pool without workers counts as dead ``start_seconds``
    after there was work for it. A call costs ``job_price``, and ``step_price`` for each of its steps at 512x512: no
    more than ``spend_per_day`` in all and ``tenant_spend_per_day`` for a tenant on a day (UTC). Its upstream takes
    ``calls_per_minute``, all workers together; None: what the settings allow one account.
    """

    name: str
    engine: PoolEngine
    model: str | None = None
    external: bool | None = None
    max_queued: Limit | None = None
    max_steps: Limit | None = None
    max_pixels: Limit | None = None
    start_seconds: Seconds = 30.0
    job_price: Amount = 0.0
    step_price: Amount = 0.0
    spend_per_day: Amount | None = None
    tenant_spend_per_day: Amount | None = None
    calls_per_minute: Limit | None = None

    @property
    def calls_upstream(self) -> bool:
        return self.engine == "cloudflare"

    @property
    def is_external(self) -> bool:
        return self.calls_upstream if self.external is None else self.external

    @property
    def is_priced(self) -> bool:
        return self.job_price > 0 or self.step_price > 0

    def price_of(self, parameters: Parameters) -> float:
        """What a call that makes this picture costs, by an engine whose own size is 512x512."""
        return self.job_price + self.step_price * parameters.steps * _pixels(parameters) / PRICED_PIXELS

    def why_not(self, parameters: Parameters, options: JobOptions) -> tuple[str, str] | None:
        """The field for which this pool cannot run such a job, and why; None if it can."""
        for option, why in LACKS.get(self.engine, {}).items():
            if getattr(options, option):
                return f"options.{option}", f"{why}: leave the option out"
        if self.max_steps is not None and parameters.num_steps > self.max_steps:
            return "num_steps", f"it takes at most {self.max_steps} steps: ask for fewer"
        given = "width" if parameters.width is not None else "height" if parameters.height is not None else None
        if self.max_pixels is not None and given is not None and _pixels(parameters) > self.max_pixels:
            side = math.isqrt(self.max_pixels)
            return given, f"it makes at most {self.max_pixels} pixels ({side}x{side}): ask for fewer"
        return None


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where requests for ``model`` (None: those that name none) of these ``classes`` may go, in order of preference.

    A job that would start after more than ``max_wait`` seconds in one pool, or miss its deadline, goes on to the next.
    """

    pools: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    model: str | None = None
    classes: Annotated[tuple[RequestClass, ...], msgspec.Meta(min_length=1)] = tuple(RequestClass)
    max_wait: Seconds | None = None


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pools: Annotated[tuple[Pool, ...], msgspec.Meta(min_length=1)]
    routes: Annotated[tuple[Route, ...], msgspec.Meta(min_length=1)]


class Pools:
    """The pools by name, and the routes in the order of the file."""

    def __init__(self, pools: Sequence[Pool], routes: Sequence[Route]) -> None:
        self.by_name = {pool.name: pool for pool in pools}
        self._routes = tuple(routes)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            ConfigurationError: names the file, the entry and the remedy.
        """
        content = read_toml(path, File, "IMG2IMG_POOLS_FILE", REMEDY)
        _check_pools(path, content.pools)
        _check_routes(path, content)
        return cls(content.pools, content.routes)

    @classmethod
    def single(cls, queue: str, engine: str) -> Self:
        """One pool for everything, for who has no file."""
        kind: PoolEngine = "cloudflare" if engine == "cloudflare" else "fake" if engine == "fake" else "diffusion"
        return cls((Pool(name=queue, engine=kind),), (Route(pools=(queue,)),))

    @property
    def models(self) -> tuple[str, ...]:
        """The names of models that a request may ask for."""
        return tuple(dict.fromkeys(route.model for route in self._routes if route.model is not None))

    def route(self, model: str | None, kind: RequestClass) -> Route | None:
        """The first route for such requests; None when there is none for ``model``."""
        return next((route for route in self._routes if route.model == model and kind in route.classes), None)


def class_of(parameters: Parameters) -> RequestClass:
    """The class of a request."""
    if parameters.mask is not None:
        return RequestClass.INPAINTING
    return RequestClass.TEXT_TO_IMAGE if parameters.image is None else RequestClass.IMAGE_TO_IMAGE


def _pixels(parameters: Parameters) -> int:
    picture = parameters.image
    source = None if picture is None else (picture.width, picture.height)
    width, height = resolve_size(parameters.width, parameters.height, PRICED_SIZE, source)
    return width * height


def _check_pools(path: Path, pools: Sequence[Pool]) -> None:
    names: set[str] = set()
    for pool in pools:
        where = f"{path}: pool {pool.name!r}"
        if not NAME.fullmatch(pool.name):
            raise ConfigurationError(f"{where}: a name has 1 to 64 letters, digits, '-' and '_': rename it")
        if pool.name in names:
            raise ConfigurationError(f"{where} is there twice: rename or remove one of them")
        names.add(pool.name)
        if pool.calls_upstream and pool.model not in (None, MODEL):
            raise ConfigurationError(
                f"{where} has the model {pool.model!r}, and the cloudflare engine calls {MODEL} only: leave model out"
            )
        if pool.calls_per_minute is not None and not pool.calls_upstream:
            raise ConfigurationError(f"{where} has calls_per_minute and its engine calls no upstream: leave it out")
        capped = pool.spend_per_day is not None or pool.tenant_spend_per_day is not None
        if pool.is_priced and pool.tenant_spend_per_day is None:
            raise ConfigurationError(f"{where} costs money: say with tenant_spend_per_day how much a tenant may spend")
        if capped and not pool.is_priced:
            raise ConfigurationError(f"{where} has a cap and no price: give job_price or step_price")


def _check_routes(path: Path, content: File) -> None:
    names = {pool.name for pool in content.pools}
    for number, route in enumerate(content.routes, 1):
        where = f"{path}: route {number}"
        if route.model is not None and not MODEL_NAME.fullmatch(route.model):
            raise ConfigurationError(f"{where}: a model's name has {MODEL_NAME_RULE}: rename it")
        for name in route.pools:
            if name not in names:
                raise ConfigurationError(f"{where} names the pool {name!r}, which is not in the file: add or rename it")
        if len(set(route.pools)) < len(route.pools):
            raise ConfigurationError(f"{where} names a pool twice: remove one of the two")
    for model in dict.fromkeys((None, *(route.model for route in content.routes))):
        covered = {kind for route in content.routes if route.model == model for kind in route.classes}
        if missing := [kind for kind in RequestClass if kind not in covered]:
            of = "without a model" if model is None else f"for {model!r}"
            raise ConfigurationError(f"{path} has no route {of} for {missing[0]}: add one, or leave its classes out")
