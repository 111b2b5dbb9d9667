"""Child processes that are started, read, stopped and, whatever happens, ended with this process."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

TETHER: Final = Path(__file__).with_name("tether.py")
MAX_LINE: Final = 64 * 1024
PUMP_GRACE: Final = 1.0


class ChildProcess:
    """One run of one program, in a session of its own, so that a terminal's Ctrl-C reaches only the parent.

    The kernel kills it when the thread that called :meth:`start` ends (Linux), so start it from the thread
    that runs the event loop. ``wait``, ``stop`` and ``kill`` may be called in any order, often and together.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, pump: asyncio.Task[None] | None) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._pump = pump
        self._exit = asyncio.create_task(self._reap(), name=f"reap {name} {self.pid}")

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        output: Callable[[str], None] | IO[bytes],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: IO[bytes] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> "ChildProcess":
        """Start ``command``; its output goes line by line to a function, or as it is to an open file."""
        tethered = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command]
        # A pipe of our own: asyncio may hold back a child's exit until all its pipes are closed, and a
        # grandchild can keep them open.
        reader, writer = os.pipe() if callable(output) else (-1, -1)
        try:
            process = await asyncio.create_subprocess_exec(
                *tethered,
                stdin=stdin or asyncio.subprocess.DEVNULL,
                stdout=writer if callable(output) else output,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                cwd=cwd,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except BaseException:
            if reader >= 0:
                os.close(reader)
            raise
        finally:
            if writer >= 0:
                os.close(writer)
        pump = asyncio.create_task(_pump(reader, output), name=f"read {name}") if callable(output) else None
        return cls(name, process, pump)

    @property
    def has_ended(self) -> bool:
        return self._exit.done()

    async def wait(self) -> int:
        """The exit status, negative for a signal, once the process is gone and its output was passed on."""
        return await asyncio.shield(self._exit)

    async def stop(self, grace: float) -> int:
        """Ask it to end, and kill it after ``grace`` seconds; 0 kills it at once."""
        if grace > 0:
            with suppress(ProcessLookupError):
                self._process.terminate()
        try:
            async with asyncio.timeout(grace):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    def kill(self) -> None:
        """End it and whatever it started in its session, now."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _reap(self) -> int:
        status = await self._process.wait()
        self.kill()  # what it may have left behind
        if self._pump is not None:
            done, _ = await asyncio.wait([self._pump], timeout=PUMP_GRACE)
            if not done:
                self._pump.cancel()
        return status


async def _pump(descriptor: int, take: Callable[[str], None]) -> None:
    """Pass on every line until the last writer has closed the pipe."""
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", buffering=0)
    )
    rest = b""
    try:
        while chunk := await stream.read(MAX_LINE):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                lines.append(rest)
                rest = b""
            for line in lines:
                take(line.decode(errors="replace").rstrip("\r"))
        if rest:
            take(rest.decode(errors="replace"))
    finally:
        transport.close()


def describe_exit(status: int) -> str:
    """Say how a process ended, for a person."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
