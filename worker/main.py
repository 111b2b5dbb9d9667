"""The worker process: opens the parts and the engine, consumes jobs, drains on SIGTERM."""

import asyncio
import math
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack

import structlog
import uuid_utils
import uvloop

from img2img import telemetry
from img2img.errors import ConfigurationError, Img2ImgError
from img2img.queue_types import WorkerInfo
from img2img.settings import Settings
from img2img.wiring import open_parts
from worker.consumer import Consumer
from worker.engines.base import Engine, EngineInfo
from worker.engines.fake import FakeEngine
from worker.runner import JobRunner
from worker.watchdog import Watchdog

log = structlog.get_logger(__name__)


def choose_engine(settings: Settings) -> Engine:
    """The engine that the settings name; ``auto`` is diffusion.

    Raises:
        ConfigurationError: the diffusion extra is not installed.
    """
    if settings.engine == "fake":
        return FakeEngine(
            settings.fake_step_seconds, obeys=settings.fake_obeys, checkpoint_seconds=settings.checkpoint_interval
        )
    try:
        from worker.engines.diffusion import DiffusionEngine  # torch takes seconds to import
    except ImportError as exc:
        raise ConfigurationError(
            f"The diffusion engine needs {exc.name}: pip install 'img2img[diffusion]', or set IMG2IMG_ENGINE=fake"
        ) from exc
    return DiffusionEngine(settings.model, settings.device)


def _describe(name: str, slots: int, engine: EngineInfo) -> WorkerInfo:
    return WorkerInfo(name, slots, engine.name, engine.model, engine.device, math.prod(engine.native_size))


async def serve(settings: Settings, engine: Engine, watchdog: Watchdog) -> None:
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
        info = _describe(name, settings.concurrency, engine.info)
        runner = JobRunner(parts.queue, parts.blobs, engine, settings, name, watchdog)
        consumer = Consumer(parts.queue, runner, info, settings)
        watchdog.before_end(consumer.stop_beating)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, consumer.drain)
        await consumer.main()
    log.info("worker_stopped", worker=name)


def main() -> None:
    """Read the settings and serve; a mistake in them is one line and exit code 2."""
    try:
        settings = Settings.from_environment()
        telemetry.configure_logging(settings.log_level, settings.log_format)
        with telemetry.tracing("img2img-worker"), Watchdog(settings.stall_limit, settings.phase_limit) as watchdog:
            # Importing torch takes seconds: before there is a loop that it could hold up.
            with watchdog.phase("importing the engine"):
                engine = choose_engine(settings)
            uvloop.run(serve(settings, engine, watchdog))
    except Img2ImgError as exc:
        sys.stderr.write(f"img2img worker: {exc}\n")
        sys.exit(2 if isinstance(exc, ConfigurationError) else 1)
