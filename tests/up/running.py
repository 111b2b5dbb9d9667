"""The ``img2img`` command as a user runs it: in a terminal, and watched from outside."""

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Final, Self

import httpx

from tests.stack import eventually

MARK: Final = "RUN_OF_A_TEST"
START_SECONDS: Final = 60.0
LAST_WORDS_SECONDS: Final = 5.0
"""For reading what a command wrote before its end; longer only where a process that it left has the terminal, too."""
COLOURS: Final = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
IMG2IMG: Final = (sys.executable, "-m", "img2img.cli")
# The first terminal that a session opens becomes the one that controls it.
# A shell starts its commands with these signals as they are by default, however the tests were started.
TAKE_TERMINAL: Final = (
    "import os, signal, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
    "[signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)]; "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A command in a terminal of its own, so that Ctrl-C typed there reaches whom it would reach."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        master, slave = pty.openpty()
        self._master = master
        self._written: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *IMG2IMG, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, **environment, MARK: self.mark, "COLUMNS": "200"},
            start_new_session=True,
        )
        os.close(slave)
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, name="read the terminal")
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._stop_reading()
        if self._master >= 0:
            os.close(self._master)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        """What was shown so far, without colours; what the spinner wrote over is kept as lines of its own."""
        return COLOURS.sub("", "".join(self._written)).replace("\r\n", "\n").replace("\r", "\n")

    def shows(self, words: str, seconds: float = START_SECONDS) -> str:
        """Wait until ``words`` are shown; the text so far."""

        def look() -> bool:
            if has_ended := self._process.poll() is not None:
                self._reader.join(LAST_WORDS_SECONDS)
            assert words in self.text or not has_ended, f"ended without {words!r}"
            return words in self.text

        try:
            eventually(look, repr(words), seconds)
        except AssertionError as exc:
            raise AssertionError(f"{exc}:\n{self.text}") from exc
        return self.text

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def hang_up(self) -> None:
        """Close the terminal's window."""
        self._stop_reading()
        os.close(self._master)
        self._master = -1

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float = 60.0) -> int:
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        return status

    def processes(self) -> dict[int, str]:
        """Every process that the command started, itself included, and its command line."""
        mark = f"{MARK}={self.mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue  # it ended meanwhile
        return found

    def child(self, kind: str) -> int:
        """The process id of ``gateway``, ``worker`` or ``valkey``, once there is exactly one."""
        words = {"gateway": "-m gateway", "worker": "-m worker", "valkey": "valkey-server"}[kind]

        def look() -> list[int]:
            found = [pid for pid, command in self.processes().items() if words in command and "tether" not in command]
            return found if len(found) == 1 else []

        return eventually(look, f"one {kind} in {self.processes()}")[0]

    def all_gone(self, seconds: float = 60.0) -> None:
        """Wait until no process of the command is left."""
        try:
            eventually(lambda: not self.processes(), "no process left", seconds)
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {self.processes()}") from exc

    def _stop_reading(self) -> None:
        self._closing.set()
        self._reader.join()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while not self._closing.is_set():
            if not select.select([self._master], [], [], 0.02)[0]:
                continue
            try:
                chunk = os.read(self._master, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                return
            self._written.append(decoder.decode(chunk))


class Up(Terminal):
    """``img2img up`` with the fake engine, or a pools file, on free ports; ready."""

    def __init__(self, data_dir: Path, *arguments: str, pools: Path | None = None, **environment: str) -> None:
        ports = ("--http-port", "0", "--grpc-port", "0")
        what = ("--engine", "fake") if pools is None else ("--pools", str(pools))
        super().__init__("up", *what, "--data-dir", str(data_dir), *ports, *arguments, **environment)

    def __enter__(self) -> Self:
        try:
            text = self.shows("Ctrl-C stops it")
        except BaseException:
            self.__exit__()
            raise
        found = re.search(r"REST +(http://\S+)/v1/jobs", text), re.search(r"gRPC +(\S+)", text)
        assert found[0], text
        assert found[1], text
        self.http, self.grpc = found[0][1], found[1][1]
        return self

    def is_ready(self) -> bool:
        """Whether the service takes jobs now."""
        try:
            return httpx.get(f"{self.http}/health/ready", trust_env=False, timeout=60).status_code == 200
        except httpx.TransportError:
            return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command without a terminal, to its end."""
    return subprocess.run(
        [*IMG2IMG, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )
