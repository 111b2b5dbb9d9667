"""The whole service on one machine: Valkey, gateway and workers as child processes that are kept alive.

This is what ``img2img up`` and ``img2img demo`` run. Nothing here takes signals; the commands do.
"""

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec

from img2img.children import ChildProcess, describe_exit
from img2img.embedded import STOP_GRACE, DataLock, EmbeddedValkey
from img2img.errors import Unavailable
from img2img.pools import Pool, Pools
from img2img.ports import free_ports
from img2img.queue import JobQueue
from img2img.server import open_redis
from img2img.settings import PREFIX, Settings

HOST: Final = "127.0.0.1"
MAX_CRASHES: Final = 5  # in a row
DRAIN_SECONDS: Final = 10.0
DRAIN_MARGIN: Final = 10.0
POLL_SECONDS: Final = 0.1
TAIL_LINES: Final = 20
CONFIGURATION_STATUS: Final = 2  # gateway and worker exit with it when a setting is wrong

# -P: a folder named `worker` where the command is typed must not be taken for ours.
COMMANDS: Final[Mapping[str, Sequence[str]]] = {
    name: (sys.executable, "-P", "-m", name) for name in ("gateway", "worker")
}
LEFT_OUT: Final = frozenset({"IMG2IMG_TLS_CERT", "IMG2IMG_TLS_KEY"})  # loopback needs no TLS
FOR_UPSTREAM: Final = f"{PREFIX}UPSTREAM_"


class ServiceFailed(Exception):
    """A child process crashed so often, or so clearly, that starting it again makes no sense."""


class Pauses(msgspec.Struct, frozen=True):
    """The seconds before a service is started again: ``first``, then twice as long each time, up to ``longest``.

    A service that ran for ``steady`` seconds begins with the first one again.
    """

    first: float
    longest: float
    steady: float


SERVER_PAUSES: Final = Pauses(0.2, 5.0, 30.0)
WORKER_PAUSES: Final = Pauses(1.0, 30.0, 60.0)


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What ``img2img up`` is asked for; a port of 0 is any free one, a ``None`` the setting's own default.

    ``workers`` is for each pool of the file ``pools``, if there is one.
    """

    data_dir: Path
    pools: Path | None = None
    engine: str | None = None
    model: str | None = None
    upstream: str | None = None
    http_port: int = 8000
    grpc_port: int = 50051
    workers: int = 1
    log_level: str | None = None

    @property
    def http_url(self) -> str:
        return f"http://{HOST}:{self.http_port}"


class Report(Protocol):
    """Where the supervisor tells what goes on. No method raises."""

    def child_line(self, name: str, line: str) -> None:
        """A line of a child's output."""

    def waiting(self, what: str) -> None:
        """What is being waited for now; "" when nothing is."""

    def say(self, text: str) -> None:
        """Something the user should know."""


class Service:
    """One child process that is started again when it ends, a little later each time.

    When it crashes too often in a row it is given up, unless ``is_proven`` says that it can work: then a job may be
    to blame, and the queue sees to such a job.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[ChildProcess]],
        tail: Callable[[], Sequence[str]],
        grace: float,
        report: Report,
        pauses: Pauses,
    ) -> None:
        self.name = name
        self.is_proven = False
        self._start = start
        self._tail = tail
        self._grace = grace
        self._report = report
        self._pauses = pauses
        self._process: ChildProcess | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        self.adopt(await self._start())

    def adopt(self, process: ChildProcess) -> None:
        """Keep alive what was started already."""
        self._process = process
        self._keeper = asyncio.create_task(self._keep(process), name=f"keep {self.name}")

    def check(self) -> None:
        """Raise what made the keeper give up, if it did.

        Raises:
            ServiceFailed, ConfigurationError: see :meth:`_keep`.
        """
        if self._keeper is not None and self._keeper.done() and not self._keeper.cancelled():
            self._keeper.result()

    async def gave_up(self) -> None:
        """Return when nobody keeps it alive any more."""
        if self._keeper is not None:
            await asyncio.wait([self._keeper])

    async def stop(self) -> None:
        """End the process; also before it was started, and twice."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._process is not None:
            await self._process.stop(self._grace)

    def kill(self) -> None:
        """End the process at once and let nobody start it again."""
        if self._keeper is not None:
            self._keeper.cancel()
        if self._process is not None:
            self._process.kill()

    async def _keep(self, process: ChildProcess) -> None:
        crashes, pause = 0, 0.0
        while True:
            started = time.monotonic()
            status = await process.wait()
            if crashes == 0 or time.monotonic() - started > self._pauses.steady:
                crashes, pause = 1, self._pauses.first
            else:
                crashes, pause = crashes + 1, min(2 * pause, self._pauses.longest)
            how = describe_exit(status)
            if status == CONFIGURATION_STATUS or (crashes >= MAX_CRASHES and not self.is_proven):
                raise self._failure(how, crashes)
            self._report.say(f"{self.name} ended ({how}): starting it again in {pause:.1f} s")
            await asyncio.sleep(pause)
            process = self._process = await self._start()

    def _failure(self, how: str, crashes: int) -> ServiceFailed:
        words = "".join(f"\n  {line}" for line in self._tail())
        times = f" for the {crashes}th time in a row" if crashes > 1 else ""
        return ServiceFailed(f"{self.name} ended{times} ({how}). The last it said:{words or ' nothing'}")


class Supervisor:
    """Everything up on entering (though not yet ready), everything gone on leaving, in the right order."""

    def __init__(self, options: UpOptions, report: Report, commands: Mapping[str, Sequence[str]] = COMMANDS) -> None:
        self.options = options
        self.settings = Settings()
        self.redis_url = ""
        self.is_stopping = False
        self._report = report
        self._commands = commands
        self._resources = AsyncExitStack()
        self._valkey: Service | None = None
        self._gateway: Service | None = None
        self._workers: list[Service] = []
        self._pools: Sequence[Pool] = ()

    async def __aenter__(self) -> Self:
        """Lock the data folder, check the ports, then start Valkey, the gateway and the workers.

        Raises:
            ConfigurationError: something is in the way; the message names it and the option to change.
        """
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def services(self) -> list[Service]:
        return [service for service in (self._valkey, self._gateway, *self._workers) if service]

    async def ready(self) -> None:
        """Return when the service takes jobs and every pool has a worker.

        Raises:
            ServiceFailed: a part of it does not come up.
        """
        import httpx

        async with (
            # trust_env: a proxy in the environment is not for our own loopback.
            httpx.AsyncClient(base_url=self.options.http_url, trust_env=False) as http,
            open_redis(self.redis_url) as redis,
        ):
            queues = [JobQueue(redis, pool.name) for pool in self._pools]
            while True:
                self._check()
                try:
                    answer = await http.get("/health/ready")
                    without = [queue.name for queue in queues if not (await queue.stats()).workers]
                except httpx.TransportError:
                    self._report.waiting("the gateway")
                except Unavailable:
                    self._report.waiting("Valkey")
                else:
                    if answer.status_code == httpx.codes.OK and not without:
                        break
                    self._report.waiting(_a_worker(without))
                await asyncio.sleep(POLL_SECONDS)
        for worker in self._workers:
            worker.is_proven = True
        self._report.waiting("")

    async def wait(self) -> None:
        """Keep everything running, for good.

        Raises:
            ServiceFailed: a part of it crashed too often.
        """
        endings = [asyncio.create_task(service.gave_up(), name="watch services") for service in self.services]
        try:
            await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for ending in endings:
                ending.cancel()
        self._check()

    def kill(self) -> None:
        """Leave no time to anybody: for a second Ctrl-C."""
        for service in self.services:
            service.kill()

    def _check(self) -> None:
        for service in self.services:
            service.check()

    async def _start(self) -> None:
        self._report.waiting("the data folder")
        lock = await self._resources.enter_async_context(DataLock(self.options.data_dir))
        self.options = await _with_free_ports(self.options)
        environment = self._environment()
        self.settings = Settings.from_environment(environment)
        if self.settings.pools_file is not None:
            self._pools = tuple(Pools.load(self.settings.pools_file).by_name.values())
        grace = self.settings.drain_timeout + DRAIN_MARGIN

        self._report.waiting("Valkey")
        valkey = EmbeddedValkey(self.options.data_dir, lock=lock)
        await self._resources.enter_async_context(valkey)
        self._valkey = Service("valkey", valkey.start, valkey.tail, STOP_GRACE, self._report, SERVER_PAUSES)
        self._valkey.adopt(valkey.process)
        environment["IMG2IMG_REDIS_URL"] = self.redis_url = valkey.url

        self._report.waiting("the gateway")
        self._gateway = self._service("gateway", "gateway", environment, grace)
        await self._gateway.start()
        for name, its_environment in self._worker_environments(environment):
            # A lease longer, in which interrupted jobs leave checkpoints.
            worker = self._service(name, "worker", its_environment, grace + self.settings.lease)
            self._workers.append(worker)
            await worker.start()

    async def _stop(self) -> None:
        """Stop what was started; a second Ctrl-C meanwhile calls :meth:`kill` and this returns at once."""
        self.is_stopping = True
        # Workers first, while the gateway still tells their clients and Valkey takes back their jobs.
        # Valkey last, because the others need it to the end.
        for services in (self._workers, [self._gateway], [self._valkey]):
            running = [service for service in services if service]
            if running:
                names = " and ".join(service.name for service in running)
                self._report.waiting(f"{names} to stop (Ctrl-C again: at once)")
            await asyncio.gather(*(service.stop() for service in running))
        await self._resources.aclose()
        self._report.waiting("")

    def _service(self, name: str, program: str, environment: Mapping[str, str], grace: float) -> Service:
        tail: deque[str] = deque(maxlen=TAIL_LINES)

        def take(line: str) -> None:
            tail.append(line)
            self._report.child_line(name, line)

        async def start() -> ChildProcess:
            tail.clear()
            return await ChildProcess.start(name, self._commands[program], take, environment=environment)

        pauses = WORKER_PAUSES if program == "worker" else SERVER_PAUSES
        return Service(name, start, lambda: tail, grace, self._report, pauses)

    def _worker_environments(self, environment: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Name and environment of each worker."""
        each: dict[str, Mapping[str, str]] = {
            f"worker {pool.name}": _environment_in(pool, environment) for pool in self._pools
        }
        for name, its_environment in (each or {"worker": environment}).items():
            for number in range(1, self.options.workers + 1):
                yield name if self.options.workers == 1 else f"{name} {number}", its_environment

    def _environment(self) -> dict[str, str]:
        """The children's environment: ours, with what this command decides on top."""
        decided = {
            "HOST": HOST,
            "HTTP_PORT": self.options.http_port,
            "GRPC_PORT": self.options.grpc_port,
            "POOLS_FILE": self.options.pools,
            "ENGINE": self.options.engine,
            "MODEL": self.options.model,
            "UPSTREAM_URL": self.options.upstream,
            "LOG_LEVEL": self.options.log_level,
        }
        # A person waits in front of the terminal, not a rolling update.
        defaults = {
            "IMG2IMG_LOG_FORMAT": "console",
            "IMG2IMG_DRAIN_TIMEOUT": f"{DRAIN_SECONDS:g}",
            "IMG2IMG_METRICS_PORT": "0",  # one for each worker
        }
        ours = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        given = {f"{PREFIX}{name}": str(value) for name, value in decided.items() if value is not None}
        return defaults | ours | given


def _environment_in(pool: Pool, environment: Mapping[str, str]) -> dict[str, str]:
    """That of a worker of the pool; credentials of the upstream go only to who needs them."""
    calls = pool.engine == "cloudflare"
    needed = {name: value for name, value in environment.items() if calls or not name.startswith(FOR_UPSTREAM)}
    return {**needed, f"{PREFIX}QUEUE": pool.name}


def _a_worker(pools: Sequence[str]) -> str:
    return f"a worker of {' and '.join(pools)}" if pools else "a worker to load its model"


async def _with_free_ports(options: UpOptions) -> UpOptions:
    """The options with free ports in place of 0.

    Raises:
        ConfigurationError: a port cannot be used; names it, why, and the option that changes it.
    """
    wanted = {"--http-port": options.http_port, "--grpc-port": options.grpc_port}
    http_port, grpc_port = await free_ports(HOST, wanted)
    return msgspec.structs.replace(options, http_port=http_port, grpc_port=grpc_port)
