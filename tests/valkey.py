"""Valkey servers for tests that need more than one, or a certain configuration, or to kill one; on TCP ports."""

import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from img2img.embedded import find_binary
from img2img.ports import any_port
from tests.stack import eventually


def free_port() -> int:
    """A port of loopback that nobody listens on, and that stays free until it is used."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := any_port()))
            return port


class ValkeyServer:
    """A server, or a sentinel, in ``folder``, with ``config`` lines of its own; ended when the block is left."""

    def __init__(self, folder: Path, *config: str, password: str | None = None, sentinel: bool = False) -> None:
        self.port = free_port()
        self._password = password
        self._folder = folder
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"port {self.port}", "bind 127.0.0.1", *config]
        if not sentinel:
            lines.append('save ""')
        if password is not None:
            lines.append(f'requirepass "{password}"')
        (folder / "server.conf").write_text("\n".join([*lines, ""]))

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_up()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> "redis.Redis":
        """For the test's own use; connects again when a failover or a restart has cut it off."""
        again = Retry(NoBackoff(), 3)
        return redis.Redis(host="127.0.0.1", port=self.port, password=self._password, retry=again)

    def start(self) -> None:
        """Start it, again on the same port and data; it may not answer yet."""
        command = [str(find_binary()), "server.conf", *(["--sentinel"] if self._sentinel else [])]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)

    def wait_up(self) -> None:
        eventually(self._answers, f"a server on {self.port}, see {self._folder}/server.log")

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        """This server, and not another one that was given the port."""
        with self.client() as client:
            try:
                return client.info("server")["process_id"] == self.pid
            except redis.RedisError:
                return False
