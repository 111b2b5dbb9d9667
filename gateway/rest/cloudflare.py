"""Cloudflare Workers AI's dialect under ``/client/v4``: the same requests, answers and errors.

A synchronous call waits for its picture. One that cannot be answered in time gets 408/3007, one that disconnects
is gone; in both cases the job lives on for a grace period in which the SDK's retry of the same body joins it.
"""

import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

from litestar import Controller, Response, get, post
from litestar.exceptions import HTTPException
from litestar.params import FromPath, FromQuery, QueryParameter

from gateway.rest import batch, catalog
from gateway.rest.context import AnyRequest, FrontDependency, idempotency_key
from gateway.rest.disconnect import unless_gone
from gateway.rest.envelope import (
    REQUEST_ID,
    new_request_id,
    on_http_exception,
    on_img2img_error,
    on_unexpected,
    success,
)
from gateway.rest.native import picture_response
from gateway.rest.openapi import RunModelOperation, envelopes
from gateway.service import Order
from img2img.errors import Img2ImgError, ModelNameInvalid, ModelNotFound, error_of
from img2img.schema import MODEL

RETRY_HEADER: Final = "x-stainless-retry-count"
CLOUDFLARE_NAME: Final = re.compile(r"@[a-z]+/[\w.-]+/[\w.-]+")


class CloudflareController(Controller):
    path = "/client/v4/accounts/{account_id:str}/ai"
    tags = ["cloudflare"]
    exception_handlers = {
        Img2ImgError: on_img2img_error,
        HTTPException: on_http_exception,
        Exception: on_unexpected,
    }

    @post(
        "/run/{model:path}",
        operation_class=RunModelOperation,
        status_code=200,
        media_type="image/png",
        responses=envelopes(400, 401, 403, 404, 408, 409, 413, 429, 500, 503),
    )
    async def run(
        self, request: AnyRequest, front: FrontDependency, account_id: FromPath[str], model: FromPath[str]
    ) -> Response[bytes]:
        """Run the model as Cloudflare does: raw PNG bytes, or an error envelope.

        The model is Cloudflare's, or one that the service has routes for, and may be spelt with `/` or `%2F`; the body
        is JSON whatever its type says. `?queueRequest=true` takes a batch.
        """
        account = front.authenticate(request, account_id)
        request_id = new_request_id()
        request.scope["state"][REQUEST_ID] = request_id
        chosen = check_model(model.strip("/"), front.service.models)
        is_batch = request.query_params.get("queueRequest", "").lower() == "true"
        async with AsyncExitStack() as stack:
            async with front.body(request, limit=batch.MAX_BYTES if is_batch else None) as body:
                if batch.is_poll(body):
                    return await batch.poll(front, account, body, request_id)
                if is_batch:
                    return success(await batch.submit(front, account, body, chosen), request_id)
                order = _order(request, account, body, chosen)
                attendance = await stack.enter_async_context(front.service.attend(order, front.settings.retry_grace))
                del body, order  # the wait may be long, and the picture is stored
            async with front.drain.bound():
                outcome = await unless_gone(request, attendance.outcome(front.settings.sync_timeout))
        if outcome.error is not None:
            raise error_of(outcome.error.code, outcome.error.message)
        picture = await front.service.picture(attendance.job_id, outcome)
        return picture_response(picture, {REQUEST_ID: request_id})

    @get("/models/search", responses=envelopes(400, 401, 403, 404))
    async def search_models(
        self,
        request: AnyRequest,
        front: FrontDependency,
        account_id: FromPath[str],
        author: FromQuery[str | None] = None,
        task: FromQuery[str | None] = None,
        search: FromQuery[str | None] = None,
        hide_experimental: FromQuery[bool] = False,
        page: Annotated[int, QueryParameter(ge=1)] = 1,
        per_page: Annotated[int, QueryParameter(ge=1, le=100)] = 20,
    ) -> Response[bytes]:
        """List the models that match."""
        front.authenticate(request, account_id)
        found = catalog.search_models(
            front.service.models, author=author, task=task, search=search, hide_experimental=hide_experimental
        )
        return _page(found, page, per_page)

    @get("/models/schema", responses=envelopes(400, 401, 403, 404))
    async def model_schema(
        self, request: AnyRequest, front: FrontDependency, account_id: FromPath[str], model: FromQuery[str]
    ) -> Response[bytes]:
        """Input and output schema of a model, the same for all."""
        front.authenticate(request, account_id)
        check_model(model, front.service.models)
        return success(catalog.model_schema(), new_request_id())

    @get("/tasks/search", responses=envelopes(400, 401, 403, 404))
    async def search_tasks(
        self, request: AnyRequest, front: FrontDependency, account_id: FromPath[str]
    ) -> Response[bytes]:
        """List the tasks."""
        front.authenticate(request, account_id)
        return _page([catalog.TASK], 1, 20)


def check_model(name: str, models: Sequence[str]) -> str | None:
    """What to ask for as ``options.model``: one of ``models``, or None for Cloudflare's if that is none of them.

    Raises:
        ModelNameInvalid: not of the form ``@cf/author/model``.
        ModelNotFound: of that form, but not ours.
    """
    if name in models:
        return name
    if CLOUDFLARE_NAME.fullmatch(name) is None:
        raise ModelNameInvalid(f"{name!r} is not of the form @cf/author/model")
    if name != MODEL:
        raise ModelNotFound(f"No such model {name} or task")
    return None


def _order(request: AnyRequest, account: str, body: object, model: str | None) -> Order:
    asked = body.get("options") if isinstance(body, dict) else None
    busy = isinstance(asked, dict) and asked.get("rejectIfBusy") is True
    tries = request.headers.get(RETRY_HEADER, "")
    return Order(
        front_end="cloudflare",
        account=account,
        body=body,
        options={"reject_if_busy": busy, "model": model},
        idempotency_key=idempotency_key(request),
        retry=tries.isdecimal() and tries.strip("0") != "",
    )


def _page(found: list[dict[str, Any]], page: int, per_page: int) -> Response[bytes]:
    shown = found[(page - 1) * per_page : page * per_page]
    info = {"count": len(shown), "page": page, "per_page": per_page, "total_count": len(found)}
    return success(shown, new_request_id(), result_info=info)
