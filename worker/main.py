"""The worker process: opens the parts and the engine, consumes jobs, drains on SIGTERM."""

import asyncio
import os
import signal
import socket
import sys
import time

import structlog
import uuid_utils
import uvloop

from img2img import telemetry
from img2img.errors import ConfigurationError, Img2ImgError
from img2img.queue import WorkerInfo
from img2img.settings import Settings
from img2img.wiring import open_parts
from worker.consumer import Consumer
from worker.engines.base import Engine
from worker.engines.fake import FakeEngine
from worker.runner import JobRunner

log = structlog.get_logger(__name__)


def choose_engine(settings: Settings) -> Engine:
    """The engine that the settings name; ``auto`` is diffusion.

    Raises:
        ConfigurationError: the diffusion extra is not installed.
    """
    if settings.engine == "fake":
        return FakeEngine(step_seconds=settings.fake_step_seconds)
    try:
        from worker.engines.diffusion import DiffusionEngine  # torch takes seconds to import
    except ImportError as exc:
        raise ConfigurationError(
            f"The diffusion engine needs {exc.name}: pip install 'img2img[diffusion]', or set IMG2IMG_ENGINE=fake"
        ) from exc
    return DiffusionEngine(settings.model, settings.device)


async def serve(settings: Settings, engine: Engine) -> None:
    """Work until SIGTERM or SIGINT; then drain, hand back, and close in reverse order of opening."""
    loop = asyncio.get_running_loop()
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid_utils.uuid7().hex[-6:]}"
    async with open_parts(settings) as parts:
        started = time.perf_counter()
        async with engine:
            telemetry.MODEL_LOAD_SECONDS.observe(time.perf_counter() - started)
            info = WorkerInfo(name, settings.concurrency, engine.info.name, engine.info.model, engine.info.device)
            runner = JobRunner(parts.queue, parts.blobs, engine, settings, name)
            consumer = Consumer(parts.queue, runner, info, settings)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, consumer.drain)
            await consumer.main()
    log.info("worker_stopped", worker=name)


def main() -> None:
    """Read the settings and serve; a mistake in them is one line and exit code 2."""
    try:
        settings = Settings.from_environment()
        telemetry.configure_logging(settings.log_level, settings.log_format)
        with telemetry.tracing("img2img-worker"):
            # Importing torch takes seconds: before there is a loop that it could hold up.
            engine = choose_engine(settings)
            uvloop.run(serve(settings, engine))
    except Img2ImgError as exc:
        sys.stderr.write(f"img2img worker: {exc}\n")
        sys.exit(2 if isinstance(exc, ConfigurationError) else 1)
