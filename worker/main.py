"""The worker process: opens the parts and the engine, consumes jobs, drains on SIGTERM."""

import asyncio
import math
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack
from typing import cast

import structlog
import uuid_utils
import uvloop

from img2img import telemetry, tracing
from img2img.errors import ConfigurationError, EngineFailed, Img2ImgError
from img2img.jobs import OnLost
from img2img.queue_types import WorkerInfo
from img2img.settings import Settings
from img2img.upstream import Rates, open_ledger
from img2img.wiring import open_parts
from worker.consumer import Consumer
from worker.engines.base import Engine
from worker.engines.cloudflare import CloudflareEngine, ImageForm, UpstreamOptions, load_accounts
from worker.engines.fake import FakeEngine
from worker.pool import settings_of_worker
from worker.probes import Probes, serving_probes
from worker.runner import JobRunner
from worker.safety import FakeSafetyChecker, SafetyChecker
from worker.watchdog import Watchdog

log = structlog.get_logger(__name__)


def choose_engine(settings: Settings) -> Engine:
    """The engine that the settings name; ``auto`` is diffusion.

    Raises:
        ConfigurationError: the diffusion extra is not installed, or the cloudflare engine's accounts are wrong.
    """
    if settings.engine == "cloudflare":
        return _cloudflare(settings)
    if settings.engine == "fake":
        return FakeEngine(
            settings.fake_step_seconds, obeys=settings.fake_obeys, checkpoint_seconds=settings.checkpoint_interval
        )
    try:
        from worker.engines.diffusion import DiffusionEngine, EngineOptions, Intervals  # torch takes seconds to import
    except ImportError as exc:
        raise ConfigurationError(
            f"The diffusion engine needs {exc.name}: pip install 'img2img[diffusion]', or set IMG2IMG_ENGINE=fake"
        ) from exc
    options = EngineOptions(
        max_rows=settings.max_rows,
        reproducible_rows=settings.reproducible_rows,
        precision=settings.precision,
        compiled=settings.compile,
        intervals=Intervals(settings.checkpoint_interval, settings.preview_interval),
    )
    return DiffusionEngine(settings.model, settings.device, options)


def _cloudflare(settings: Settings) -> Engine:
    accounts = load_accounts(settings.upstream_account, settings.upstream_token, settings.upstream_accounts_file)
    options = UpstreamOptions(
        url=settings.upstream_url,
        images=cast("ImageForm", settings.upstream_images),  # one of its choices, by Settings.check
        on_lost=cast("OnLost", settings.upstream_on_lost),
        max_calls=settings.upstream_max_calls,
        lowest=settings.upstream_min_concurrency,
        highest=settings.upstream_max_concurrency,
        breaker=settings.upstream_breaker,
    )
    rates = Rates(account_calls=settings.upstream_account_calls, token_calls=settings.upstream_token_calls)
    return CloudflareEngine(accounts, options, open_ledger(settings.redis_url, rates))


def choose_checker(settings: Settings) -> SafetyChecker | None:
    """The safety checker that the settings name, loaded, or None where they name none.

    Raises:
        ConfigurationError: the diffusion extra is not installed, or the checkpoint cannot be used.
    """
    if settings.safety_checker is None:
        return None
    if settings.safety_checker == "fake":
        return FakeSafetyChecker()
    try:
        from worker.engines.diffusion.safety import DiffusionSafetyChecker
    except ImportError as exc:
        raise ConfigurationError(
            f"The safety checker needs {exc.name}: pip install 'img2img[diffusion]', or unset IMG2IMG_SAFETY_CHECKER"
        ) from exc
    return DiffusionSafetyChecker(settings.safety_checker)


def _describe(name: str, engine: Engine, settings: Settings) -> WorkerInfo:
    info = engine.info
    slots = engine.slots(settings.concurrency)
    pixels = math.prod(info.native_size)
    return WorkerInfo(name, slots, info.name, info.model, info.device, pixels, paused=slots == 0)


async def serve(
    settings: Settings,
    engine: Engine,
    watchdog: Watchdog,
    checker: SafetyChecker | None = None,
    probes: Probes | None = None,
) -> None:
    """Work until SIGTERM or SIGINT; then drain, hand back, and close in reverse order of opening."""
    watchdog.watch_loop()
    loop = asyncio.get_running_loop()
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid_utils.uuid7().hex[-6:]}"
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(open_parts(settings))
        started = time.perf_counter()
        with watchdog.phase("loading the model"):
            await stack.enter_async_context(engine)
        telemetry.MODEL_LOAD_SECONDS.observe(time.perf_counter() - started)
        info = _describe(name, engine, settings)
        runner = JobRunner(parts.queue, parts.blobs, engine, settings, name, watchdog, checker)
        consumer = Consumer(parts.queue, runner, engine, info, settings)
        watchdog.before_end(consumer.stop_beating)
        if probes is not None:
            probes.follow(consumer)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, consumer.drain)
        await _consume(consumer, engine)
    log.info("worker_stopped", worker=name)


async def _consume(consumer: Consumer, engine: Engine) -> None:
    """Run the consumer until it was told to drain.

    Raises:
        EngineFailed: the engine broke, and what it had was handed back: another process may do better.
    """
    consuming = asyncio.create_task(consumer.main(), name="consume")
    breaking = asyncio.create_task(engine.broken(), name="engine")
    try:
        await asyncio.wait({consuming, breaking}, return_when=asyncio.FIRST_COMPLETED)
        if broke := breaking.done():
            consumer.drain()
        await consuming
    finally:
        breaking.cancel()
    if broke:
        raise EngineFailed("The engine can make no more pictures: see the log, and start the worker again")


def main() -> None:
    """Read the settings and serve; a mistake in them is one line and exit code 2."""
    try:
        settings = settings_of_worker(Settings.from_environment())
        telemetry.configure_logging(settings.log_level, settings.log_format)
        with (
            tracing.tracing("img2img-worker"),
            Watchdog(settings.stall_limit, settings.phase_limit) as watchdog,
            serving_probes(Probes(watchdog), settings.metrics_host, settings.metrics_port) as probes,
        ):
            # Importing torch takes seconds: before there is a loop that it could hold up.
            with watchdog.phase("importing the engine"):
                engine = choose_engine(settings)
            with watchdog.phase("loading the safety checker"):
                checker = choose_checker(settings)
            uvloop.run(serve(settings, engine, watchdog, checker, probes))
    except Img2ImgError as exc:
        sys.stderr.write(f"img2img worker: {exc}\n")
        sys.exit(2 if isinstance(exc, ConfigurationError) else 1)
