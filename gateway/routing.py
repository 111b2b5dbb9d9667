"""From a checked request to the pools that it may go to; which of them it goes to, the queue decides.

What a job may do is settled here, at its submission, and stays on its record: a file that changes applies to new jobs.
"""

from typing import Final

import msgspec

from img2img.errors import ConfigurationError, ModelNotFound, ResidencyConflict, SpendCapReached, Unsupported
from img2img.pools import LACKS, Pool, Pools, RequestClass, Route, class_of
from img2img.queue_types import MILLIONTHS, Candidate, Share
from img2img.requests import CheckedRequest
from img2img.server import milliseconds
from img2img.settings import Settings

DAY_SECONDS: Final = 24 * 3600.0


class Routed(msgspec.Struct, frozen=True):
    """A request that may be submitted: with what its account is entitled to, and the pools that may run it."""

    checked: CheckedRequest
    share: Share
    pools: tuple[Candidate, ...]


class Router:
    """The pools and routes of the settings."""

    def __init__(self, pools: Pools, max_queued: int) -> None:
        self.pools = pools
        self._max_queued = max_queued

    @property
    def models(self) -> tuple[str, ...]:
        """The names of models that requests may ask for."""
        return self.pools.models

    def candidates(self, checked: CheckedRequest, share: Share) -> tuple[Candidate, ...]:
        """The pools that may run the job, the preferred one first; at least one.

        Raises:
            ModelNotFound: no route is for the model that the request names.
            Unsupported: every pool of its route lacks something that it asks for; names it for the first of them.
            ResidencyConflict: those that could run it are outside, and the account's pictures stay here.
            SpendCapReached: it costs more than any day's cap.
        """
        route = self._route(checked)
        able, why_not = [], None
        for name in route.pools:
            pool = self.pools.by_name[name]
            reason = pool.why_not(checked.parameters, checked.options)
            if reason is None:
                able.append(pool)
            why_not = why_not or reason
        if not able and why_not is not None:
            field, words = why_not
            raise Unsupported(field, f"'/{field.replace('.', '/')}': no pool of this service can do that: {words}")
        allowed = [pool for pool in able if not (share.local_only and pool.is_external)]
        if not allowed:
            raise ResidencyConflict(
                "This account's pictures are made here only, and every pool that could run this request is outside: "
                "ask for what a local pool can do, or have the account's residency changed"
            )
        candidates = tuple(self._candidate(pool, route, checked, share) for pool in allowed)
        payable = tuple(candidate for candidate in candidates if _may_be_paid(candidate))
        if not payable:
            raise SpendCapReached(
                "This request costs more than may be spent on a day on this account's jobs: ask for less, or for a "
                "higher cap",
                DAY_SECONDS,
            )
        return payable

    def _route(self, checked: CheckedRequest) -> Route:
        model = checked.options.model
        route = self.pools.route(model, class_of(checked.parameters))
        if route is None:
            known = f", or name one of these: {', '.join(self.models)}" if self.models else ": no route names a model"
            raise ModelNotFound(f"No such model {model!r}: leave 'options.model' out{known}")
        return route

    def _candidate(self, pool: Pool, route: Route, checked: CheckedRequest, share: Share) -> Candidate:
        cap = pool.tenant_spend_per_day if share.spend_per_day is None else share.spend_per_day
        priced = pool.is_priced
        return Candidate(
            name=pool.name,
            max_queued=self._max_queued if pool.max_queued is None else pool.max_queued,
            max_wait=None if route.max_wait is None else milliseconds(route.max_wait),
            start=milliseconds(pool.start_seconds),
            price=max(1, _millionths(pool.price_of(checked.parameters))) if priced else 0,
            cap=_millionths(pool.spend_per_day) if priced and pool.spend_per_day is not None else None,
            tenant_cap=_millionths(cap) if priced and cap is not None else None,
        )


def open_router(settings: Settings) -> Router:
    """The router of the settings' file, or of one pool for everything.

    Raises:
        ConfigurationError: the file is wrong, or asks for what no pool of a route can do.
    """
    if settings.pools_file is None:
        pools = Pools.single(settings.queue, settings.engine)
    else:
        pools = Pools.load(settings.pools_file)
    if settings.reproducible:
        _check_reproducible(pools)
    return Router(pools, settings.max_queued)


def _check_reproducible(pools: Pools) -> None:
    for model in (None, *pools.models):
        for kind in RequestClass:
            route = pools.route(model, kind)
            if route and all("reproducible" in LACKS.get(pools.by_name[name].engine, {}) for name in route.pools):
                raise ConfigurationError(
                    f"IMG2IMG_REPRODUCIBLE makes every job reproducible, which no pool of the route for {kind} can do "
                    f"({', '.join(route.pools)}): unset it, or add a pool that can"
                )


def _may_be_paid(pool: Candidate) -> bool:
    return all(cap is None or pool.price <= cap for cap in (pool.cap, pool.tenant_cap))


def _millionths(amount: float) -> int:
    return round(amount * MILLIONTHS)
