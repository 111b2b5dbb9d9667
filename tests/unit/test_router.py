"""Which pools a request may go to, before the queue chooses."""

import pytest

from gateway.routing import Router
from img2img.errors import ModelNotFound, ResidencyConflict, SpendCapReached
from img2img.pools import Pool, Pools, Route
from img2img.queue_types import Share
from img2img.requests import build_request

LOCAL = Pool(name="local", engine="fake")
BURST = Pool(name="burst", engine="cloudflare", job_price=0.5, spend_per_day=10.0, tenant_spend_per_day=2.0)


def names(*pools: Pool, share: Share) -> list[str]:
    router = Router(Pools(pools, [Route(pools=tuple(pool.name for pool in pools))]), max_queued=10)
    return [candidate.name for candidate in router.candidates(build_request({"prompt": "a lion"}), share)]


def test_the_routes_order_is_kept() -> None:
    assert names(BURST, LOCAL, share=Share()) == ["burst", "local"]


def test_who_stays_here_goes_to_no_pool_outside() -> None:
    assert names(BURST, LOCAL, share=Share(local_only=True)) == ["local"]
    with pytest.raises(ResidencyConflict):
        names(BURST, share=Share(local_only=True))


def test_a_pool_that_no_day_can_pay_for_is_left_out() -> None:
    """Told to come back tomorrow, its caller would hear the same for ever."""
    assert names(LOCAL, BURST, share=Share(spend_per_day=0.4)) == ["local"]
    with pytest.raises(SpendCapReached, match="on a day"):
        names(BURST, share=Share(spend_per_day=0.0))


def test_an_unknown_model_is_told_which_there_are() -> None:
    request = build_request({"prompt": "a lion"}, {"model": "dogs"})
    anything, cats = Route(pools=("local",)), Route(pools=("local",), model="cats")
    with pytest.raises(ModelNotFound, match=r"leave 'options\.model' out, or name one of these: cats$"):
        Router(Pools([LOCAL], [anything, cats]), max_queued=10).candidates(request, Share())
    with pytest.raises(ModelNotFound, match=r"leave 'options\.model' out: no route names a model$"):
        Router(Pools([LOCAL], [anything]), max_queued=10).candidates(request, Share())
