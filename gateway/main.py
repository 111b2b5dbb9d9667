"""The gateway process: REST and gRPC on one event loop, drained in order on SIGTERM."""

import asyncio
import contextlib
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator

import structlog
import uvicorn
import uvloop
from litestar.types import ASGIApp
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.propagators import TraceResponsePropagator, set_global_response_propagator

from gateway.budget import Budgets
from gateway.certificates import Certificates, open_certificates
from gateway.drain import Drain
from gateway.rest.app import build_app
from gateway.rest.connection import BoundedConnection
from gateway.rest.measures import measured
from gateway.routing import open_router
from gateway.rpc.scaler import open_scaler
from gateway.rpc.server import open_server
from gateway.scaling import Scaling
from gateway.service import JobService
from gateway.sockets import listen
from gateway.tenants import Tenants
from gateway.upkeep import run_upkeep, run_upkeep_of_others
from img2img import telemetry, tracing
from img2img.errors import ConfigurationError, Img2ImgError
from img2img.events import EventHub
from img2img.settings import Settings
from img2img.wiring import Parts, open_parts

UNTRACED = "://[^/]*/health/live$,://[^/]*/health/ready$,://[^/]*/metrics$"
"""Addresses without spans: patterns that are searched for in the whole of one, the caller's Host header included."""
CONVENTIONS_VARIABLE = "OTEL_SEMCONV_STABILITY_OPT_IN"
"""Without it the middleware names attributes as before they were settled."""

log = structlog.get_logger(__name__)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to :func:`serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def load_tenants(settings: Settings) -> Tenants:
    """The accounts and their keys; without a file everybody on this machine is one account.

    Raises:
        ConfigurationError: no file although others could reach the service, or a broken file.
    """
    if settings.tenants_file is not None:
        return Tenants.load(settings.tenants_file)
    if not settings.is_loopback:
        raise ConfigurationError(
            f"Without keys the service listens on loopback only, not on {settings.host}: "
            "set IMG2IMG_TENANTS_FILE (img2img keys new ACCOUNT), or IMG2IMG_HOST=127.0.0.1"
        )
    return Tenants.open_local()


def http_server(app: ASGIApp, settings: Settings, certificates: Certificates | None) -> HttpServer:
    """A server whose calls are traced by the stable conventions, and whose answers say so in ``traceresponse``."""
    os.environ.setdefault(CONVENTIONS_VARIABLE, "http")
    set_global_response_propagator(TraceResponsePropagator())  # type: ignore[no-untyped-call]
    traced = OpenTelemetryMiddleware(
        measured(app),
        excluded_urls=UNTRACED,
        exclude_spans=["receive", "send"],
        # Until the route is known the method is all that may name a span: paths hold ids.
        default_span_details=lambda scope: (scope["method"], {}),
    )
    config = uvicorn.Config(
        traced,
        http=BoundedConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        reset_contextvars=True,  # a request that is sent before the last one is answered belongs to no trace of that
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
    )
    if certificates is not None:
        config.load()  # which would set this, too
        config.ssl = certificates.context()
    return HttpServer(config)


def raise_descriptor_limit() -> None:
    """Allow as many connections as the system lets this process have: where little is said that is 1,024 files, and
    whoever connects beyond that is cut off without a word.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says "infinity" and takes less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _start_side_tasks(group: asyncio.TaskGroup, service: JobService, parts: Parts) -> list[asyncio.Task[None]]:
    """What goes on beside the servers: upkeep of every queue, and a look at the event loop's lag."""
    retention = parts.settings.input_retention
    upkeeps = [
        group.create_task(run_upkeep(queue, parts.blobs, retention), name=f"upkeep {name}")
        for name, queue in service.queues.items()
    ]
    others = run_upkeep_of_others(parts.queue, service.queues.keys(), parts.blobs, retention)
    return [
        group.create_task(telemetry.measure_lag(), name="lag"),
        group.create_task(others, name="upkeep of others"),
        *upkeeps,
    ]


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Shutdown order: readiness off and watchers let go; at once no new calls on either port, and those in flight
    finished, or answered that they should be sent again, within one drain limit; upkeep; hub; queue and blobs.
    """
    tenants, router = load_tenants(settings), open_router(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with (
        open_certificates(settings, "tls_cert", "tls_key") as certificates,
        open_parts(settings) as parts,
        EventHub(parts.queue) as hub,
    ):
        # Not before: a gateway that still waits for its server has nothing to drain, and ends at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        service = JobService(parts, hub, tenants, router)
        budgets, drain = Budgets(settings.max_body_bytes_in_flight), Drain(parts.queue, settings)
        scaling = Scaling(service, router.pools, settings)
        http = http_server(build_app(service, tenants, settings, budgets, drain, scaling), settings, certificates)
        with listen(settings, "http_port") as listener:
            async with (
                open_server(service, tenants, settings, budgets, drain, certificates) as grpc_server,
                open_scaler(scaling, settings) as scaler_port,
                asyncio.TaskGroup() as group,
            ):
                side_tasks = _start_side_tasks(group, service, parts)
                serving = group.create_task(http.serve(sockets=[listener]), name="http")
                grpc_server.set_serving(True)
                http_port = listener.getsockname()[1]
                log.info("gateway_ready", http_port=http_port, grpc_port=grpc_server.port, scaler_port=scaler_port)
                await stop.wait()
                service.drain()
                drain.begin()
                http.should_exit = True
                await asyncio.gather(serving, grpc_server.stop())
                for task in side_tasks:
                    task.cancel()
    log.info("gateway_stopped")


def main() -> None:
    """Read the settings and serve; a mistake in them is one line and exit code 2."""
    try:
        settings = Settings.from_environment()
        telemetry.configure_logging(settings.log_level, settings.log_format)
        raise_descriptor_limit()
        with tracing.tracing("img2img-gateway"):
            uvloop.run(serve(settings))
    except Img2ImgError as exc:
        sys.stderr.write(f"img2img gateway: {exc}\n")
        sys.exit(2 if isinstance(exc, ConfigurationError) else 1)
