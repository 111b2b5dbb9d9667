"""What autoscalers ask over HTTP: the seconds of work that a pool owes. For operators only."""

from typing import Annotated

from litestar import get
from litestar.params import PathParameter, QueryParameter

from gateway.rest.context import AnyRequest, FrontDependency
from gateway.rest.openapi import problems
from gateway.rest.problems import on_img2img_error, on_unexpected
from gateway.scaling import LEAST_TARGET, Signal, seconds_in
from img2img.errors import Img2ImgError

Pool = Annotated[str, PathParameter(description="The pool's name; without a pools file, the queue's.")]
Target = Annotated[
    float | None,
    QueryParameter(description="Seconds of work that one worker may owe; by default the service's own setting."),
]


@get(
    "/v1/scaling/{pool:str}",
    tags=["scaling"],
    responses=problems(400, 401, 403, 404, 503),
    exception_handlers={Img2ImgError: on_img2img_error, Exception: on_unexpected},
)
async def scaling(request: AnyRequest, front: FrontDependency, pool: Pool, target_seconds: Target = None) -> Signal:
    """How much work a pool owes, in seconds. `demand_seconds` over `target_seconds` is the number of workers wanted."""
    front.authenticate_operator(request)
    target = seconds_in("target_seconds", target_seconds, front.scaling.default_target, least=LEAST_TARGET)
    return await front.scaling.signal(pool, target)
