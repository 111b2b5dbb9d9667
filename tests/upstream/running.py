"""The stand-in for tests: in a thread of this process, or in a process of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.stack import Process, eventually
from tests.upstream.api import Api
from tests.upstream.server import Upstream


@contextmanager
def running_upstream(api: Api, certificate: tuple[Path, Path] | None = None) -> Iterator[Upstream]:
    """A server in a thread with a loop of its own, so that synchronous and asynchronous tests can use it.

    What is read of ``api`` is as it is at that moment; orders are given before the calls that they are for.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="upstream")
    thread.start()
    upstream = Upstream(api, certificate=certificate)
    try:
        asyncio.run_coroutine_threadsafe(upstream.__aenter__(), loop).result(30)
        try:
            yield upstream
        finally:
            asyncio.run_coroutine_threadsafe(upstream.__aexit__(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class UpstreamProcess(Process):
    """The stand-in in a process of its own, with its control routes."""

    def __init__(self, log: Path, *arguments: str, port: int = 0) -> None:
        super().__init__("tests.upstream", "upstream_ready", {}, log, "--port", str(port), *arguments)
        self.port = int(self.wait_ready()["port"])
        self.url = f"http://127.0.0.1:{self.port}/client/v4"

    def settings(self, **more: str) -> dict[str, str]:
        """Those of a worker that calls it."""
        return proxy_settings(self.url, **more)

    def calls(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = self._get("calls")
        return calls

    def limits(self) -> dict[str, Any]:
        """What was counted: ``accounts`` and ``tokens`` as ``limits.Seen``, and ``most_open``."""
        limits: dict[str, Any] = self._get("limits")
        return limits

    def set(self, what: str, **content: Any) -> None:
        """``script``, ``limits``, ``delay``, ``release`` or ``reset``; see ``Api.control``."""
        httpx.post(f"http://127.0.0.1:{self.port}/control/{what}", json=content, trust_env=False).raise_for_status()

    def wait_for(self, count: int, **like: Any) -> list[dict[str, Any]]:
        """Wait until there are ``count`` calls whose records are ``like`` this."""

        def found() -> list[dict[str, Any]]:
            matching = [call for call in self.calls() if like.items() <= call.items()]
            return matching if len(matching) >= count else []

        return eventually(found, f"{count} upstream calls like {like}")

    def _get(self, what: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.port}/control/{what}", trust_env=False).raise_for_status().json()


def proxy_settings(url: str, **more: str) -> dict[str, str]:
    """The settings, as variables have them, of a worker that calls the upstream at ``url``."""
    account = {"upstream_account": "acme", "upstream_token": "secret"}
    return {"engine": "cloudflare", "upstream_url": url, **account, **more}
