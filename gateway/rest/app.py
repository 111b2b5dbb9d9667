"""The REST application: routes, shared state and the handlers of last resort."""

import asyncio
import importlib.metadata
from typing import Final

from litestar import Litestar, Response
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from opentelemetry import trace

from gateway.budget import Budgets
from gateway.drain import Drain
from gateway.rest import envelope, problems
from gateway.rest.cloudflare import CloudflareController
from gateway.rest.context import AnyRequest, Front
from gateway.rest.measures import route_of
from gateway.rest.native import JobsController
from gateway.rest.openapi import openapi_config
from gateway.rest.operations import live, metrics, ready
from gateway.rest.scaling import scaling as scaling_route
from gateway.scaling import Scaling
from gateway.service import JobService
from gateway.tenants import Tenants
from img2img import tracing
from img2img.errors import Img2ImgError, Unavailable
from img2img.settings import Settings

CLOUDFLARE_PREFIX: Final = "/client/v4"


def build_app(
    service: JobService, tenants: Tenants, settings: Settings, budgets: Budgets, drain: Drain, scaling: Scaling
) -> Litestar:
    """One application per process; it opens and closes nothing."""
    front = Front(service, tenants, settings, budgets, drain, scaling)
    return Litestar(
        route_handlers=[CloudflareController, JobsController, scaling_route, live, ready, metrics],
        dependencies={"front": Provide(lambda: front, sync_to_thread=False, use_cache=True)},
        exception_handlers={
            Img2ImgError: problems.on_img2img_error,
            HTTPException: _on_http_exception,
            Exception: problems.on_unexpected,
        },
        middleware=[_answering_when_cut_off],
        openapi_config=openapi_config(importlib.metadata.version("img2img")),
        # The routes bound bodies themselves, while they arrive, with errors in their own dialect.
        request_max_body_size=None,
        before_request=_name_call,
        logging_config=None,
    )


def _answering_when_cut_off(app: ASGIApp) -> ASGIApp:
    """uvicorn cancels what is not done at the drain limit, and would answer 500 to a call that should be repeated."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app(scope, receive, sending)
        except asyncio.CancelledError:
            if begun:
                raise
            raise Unavailable("This gateway is shutting down: send the same request again") from None

    return call


def _on_http_exception(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Unknown routes have no controller: the path tells whose words to use."""
    if request.url.path.startswith(CLOUDFLARE_PREFIX):
        return envelope.on_http_exception(request, error)
    return problems.on_http_exception(request, error)


async def _name_call(request: AnyRequest) -> None:  # a coroutine: Litestar gives functions to a thread
    """The server span is named by the route, not by the path with its ids; the job's is told apart."""
    span, route = trace.get_current_span(), route_of(request.scope)
    span.update_name(f"{request.method} {route}")
    span.set_attribute("http.route", route)
    if job_id := request.path_params.get("job_id"):
        tracing.name_job(job_id)
