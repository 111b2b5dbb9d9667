"""One Valkey server, gateways and workers as real processes, each replaced as soon as it ends."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from img2img.children import ChildProcess, describe_exit
from img2img.embedded import EmbeddedValkey
from tests.calls import write_tenants
from tests.chaos.intensity import Profile
from tests.proxy import Proxy
from tests.valkey import free_port

ACCOUNTS: Final = ("amber", "beryl", "coral")
START_TRIES: Final = 60
START_PAUSE: Final = 0.3
ERRORS_SHOWN: Final = 20
TOLERATED: Final = "running task(s), timeout graceful shutdown exceeded"
"""uvicorn's word for calls that a silent server outlasts; their callers are told to come again."""
LOST_RESULTS: Final = ("result_discarded", "lease_lost")


class Life(msgspec.Struct):
    """One process from start to end; times in seconds since 1970."""

    kind: str
    name: str
    log: Path
    pid: int = 0
    ready: float = 0.0
    ended: float = 0.0
    how: str = ""
    asked: bool = False
    killed: bool = False
    discarded: int = 0
    resumed: int = 0
    errors: list[str] = []


class Member:
    """A place in the fleet: keeps one process running, and whoever hurts it marks it ``hurt`` meanwhile."""

    def __init__(self, kind: str, environment: dict[str, str], folder: Path, number: int, proxy: Proxy | None) -> None:
        self.kind = kind
        self.number = number
        self.proxy = proxy
        self.hurt = False
        self.lives: list[Life] = []
        self.up = asyncio.Event()
        self._environment = environment
        self._folder = folder
        self._child: ChildProcess | None = None

    @property
    def life(self) -> Life:
        return self.lives[-1]

    @property
    def is_well(self) -> bool:
        return self.up.is_set() and not self.hurt

    def send(self, number: signal.Signals) -> None:
        """To the process of this moment, which may have just ended."""
        if self._child is not None and not self._child.has_ended:
            os.kill(self._child.pid, number)

    def end(self, number: signal.Signals) -> None:
        """Make the process end; another one takes its place."""
        self.up.clear()
        self.life.asked = True
        self.life.killed = number == signal.SIGKILL
        self.send(number)

    async def keep(self) -> None:
        """Run one process after another until cancelled.

        Raises:
            RuntimeError: it does not start, time after time.
        """
        failures = 0
        while True:
            await self._live()
            failures = 0 if self.life.ready else failures + 1
            if failures == START_TRIES:
                raise RuntimeError(f"{self.kind} does not start: {self.life.log.read_text()[-2000:]}")
            if failures:
                await asyncio.sleep(START_PAUSE)

    async def _live(self) -> None:
        log = self._folder / f"{self.kind}-{self.number}.{len(self.lives)}.log"
        life = Life(self.kind, log.stem, log)
        self.lives.append(life)
        with log.open("w") as stream:

            def take(line: str) -> None:
                stream.write(line + "\n")
                stream.flush()
                self._note(life, line)

            self._child = child = await ChildProcess.start(
                log.stem, [sys.executable, "-m", self.kind], take, environment=self._environment
            )
            life.pid = child.pid
            try:
                status = await child.wait()
            except asyncio.CancelledError:
                await self._stop(child, life)
                raise
        self.up.clear()
        life.ended, life.how = time.time(), describe_exit(status)

    def _note(self, life: Life, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            life.errors.append(line)
            return
        event = entry.get("event")
        if event == f"{self.kind}_ready":
            life.name = entry.get("worker", life.name)
            life.ready = time.time()
            self.up.set()
        life.discarded += event in LOST_RESULTS
        life.resumed += event == "job_resumed"
        if entry.get("level") in ("error", "critical") and not str(event).endswith(TOLERATED):
            life.errors.append(line)

    async def _stop(self, child: ChildProcess, life: Life) -> None:
        life.asked = True
        self.send(signal.SIGCONT)
        status = await child.stop(20)
        life.ended, life.how = time.time(), describe_exit(status)


class Fleet:
    """Everything that can be hurt. Leaving the block ends it all, workers first."""

    def __init__(self, profile: Profile, folder: Path) -> None:
        self.profile = profile
        self.folder = folder
        self.workers: list[Member] = []
        self.gateways: list[Member] = []
        self.addresses: list[tuple[str, str]] = []
        """HTTP URL and gRPC address of each gateway; a replaced one has its predecessor's."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            self.port = free_port()
            self.valkey = await self._stack.enter_async_context(EmbeddedValkey(self.folder / "data", port=self.port))
            self._settings = self._shared_settings()
            for number in range(self.profile.gateways):
                await self._add_gateway(number)
            for number in range(self.profile.workers):
                self.workers.append(await self._add("worker", number, {}))
            await self.all_up(60)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def members(self) -> list[Member]:
        return self.gateways + self.workers

    @property
    def lives(self) -> list[Life]:
        return [life for member in self.members for life in member.lives]

    def complaints(self) -> Iterator[str]:
        """Processes that ended by themselves, or otherwise than they were asked to, and errors in their logs."""
        for life in self.lives:
            if life.ready and not life.asked:
                yield f"{life.log.stem} ended by itself: {life.how}"
            elif life.ready and not life.killed and life.how != "exit status 0":
                yield f"{life.log.stem} was asked to end, and did so with {life.how}"
            if life.ready and life.errors:
                shown = "\n    ".join(life.errors[:ERRORS_SHOWN])
                yield f"{life.log.stem} complains:\n    {shown}"

    async def all_up(self, seconds: float) -> None:
        """Wait until every place is filled.

        Raises:
            RuntimeError: not within ``seconds``; says what the first one missing said last.
        """
        for member in self.members:
            try:
                async with asyncio.timeout(seconds):
                    await member.up.wait()
            except TimeoutError as exc:
                said = "\n".join(life.log.read_text()[-1000:] for life in member.lives[-2:])
                raise RuntimeError(f"{member.life.log.stem} is not up after {seconds:g} s:\n{said}") from exc

    async def _add_gateway(self, number: int) -> None:
        http, grpc = free_port(), free_port()
        self.addresses.append((f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"))
        self.gateways.append(await self._add("gateway", number, {"http_port": str(http), "grpc_port": str(grpc)}))

    async def _add(self, kind: str, number: int, settings: dict[str, str]) -> Member:
        """The first of each kind talks to the server over its socket, the others through a proxy."""
        proxy = None
        url = self.valkey.url
        if number > 0:
            proxy = self._stack.enter_context(Proxy(self.port))
            url = proxy.url
        settings = {**self._settings, **settings, "redis_url": url}
        environment = {f"IMG2IMG_{name.upper()}": value for name, value in settings.items()}
        member = Member(kind, {**os.environ, **environment}, self.folder, number, proxy)
        keeping = asyncio.create_task(member.keep(), name=f"keep-{kind}-{number}")
        self._stack.push_async_callback(_end, keeping)
        return member

    def _shared_settings(self) -> dict[str, str]:
        profile = self.profile
        return {
            "engine": "fake",
            "metrics_port": "0",
            "log_format": "json",
            "tenants_file": write_tenants(self.folder / "tenants.toml", *ACCOUNTS),
            "lease": str(profile.lease),
            "beat": str(profile.beat),
            "attempts": str(profile.attempts),
            "retry_delay": str(profile.retry_delay),
            "drain_timeout": str(profile.drain_timeout),
            "concurrency": str(profile.slots),
            "crash_limit": str(profile.crash_limit),
            "checkpoint_interval": str(profile.checkpoint_interval),
            "preview_interval": str(profile.preview_interval),
            # What is not to be done in time shall be tried all the same.
            "refuse_late": "false",
        }


async def _end(task: "asyncio.Task[None]") -> None:
    """Cancel ``task``; what it failed with before is worth knowing, its cancellation is not."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
