"""What a worker tells machines over HTTP: its metrics, whether it lives, and whether it claims jobs.

A thread answers, so that there is an answer while the event loop is held up, and one that says so.
"""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Final, Protocol

import msgspec
import structlog

from img2img import telemetry
from img2img.errors import ConfigurationError
from worker.watchdog import Watchdog

STARTING: Final = "starting"
READY: Final = "ready"
READ_SECONDS: Final = 5.0
"""How long a client may take to send its request."""
PLAIN: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"

log = structlog.get_logger(__name__)


class Claiming(Protocol):
    """Who claims jobs."""

    @property
    def readiness(self) -> str:
        """``ready``, or what keeps it from claiming; from any thread."""
        ...


class Probes:
    """The answers to probes, from any thread. Until :meth:`follow` is called the worker is starting."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._claiming: Claiming | None = None

    def follow(self, claiming: Claiming) -> None:
        """From now on it decides about readiness."""
        self._claiming = claiming

    def live(self) -> tuple[HTTPStatus, str]:
        """Whether the event loop comes round; the queue server has no part in it."""
        if self._watchdog.is_loop_stalled:
            return HTTPStatus.SERVICE_UNAVAILABLE, "event loop stalled"
        return HTTPStatus.OK, "live"

    def ready(self) -> tuple[HTTPStatus, str]:
        """Whether the worker claims jobs, as far as its slots allow: it is open, heard, and does not drain."""
        status = STARTING if self._claiming is None else self._claiming.readiness
        return HTTPStatus.OK if status == READY else HTTPStatus.SERVICE_UNAVAILABLE, status


class Handler(BaseHTTPRequestHandler):
    """One request of a scraper or a probe."""

    timeout = READ_SECONDS

    def __init__(self, probes: Probes, *arguments: Any) -> None:
        self._probes = probes
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer by path; there is nothing else here."""
        match self.path.partition("?")[0]:
            case "/metrics":
                text, media_type = telemetry.exposition(telemetry.WORKER, self.headers.get("accept", ""))
                self._answer(HTTPStatus.OK, text, media_type)
            case "/health/live":
                self._answer_probe(*self._probes.live())
            case "/health/ready":
                self._answer_probe(*self._probes.ready())
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"See /metrics, /health/live and /health/ready\n", PLAIN)

    def log_message(self, *_: object) -> None:
        """Probes come every few seconds: nothing to tell."""

    def _answer_probe(self, code: HTTPStatus, status: str) -> None:
        self._answer(code, msgspec.json.encode({"status": status}), JSON)

    def _answer(self, code: HTTPStatus, body: bytes, media_type: str) -> None:
        self.send_response(code)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection, which has one request.

    Not http.server's own: that looks up the host's name, which may take as long as a name server is away.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, probes: Probes, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), partial(Handler, probes))

    def handle_error(self, *_: object) -> None:
        """A client that went away is no matter; anything else should show."""
        log.warning("metrics_request_failed", exc_info=True)


@contextmanager
def serving_probes(probes: Probes, host: str, port: int) -> Iterator[Probes]:
    """Answer on ``host`` and ``port`` (0 for a free one, which the log names, and -1 for none) during the block.

    Raises:
        ConfigurationError: the port cannot be had.
    """
    if port < 0:
        yield probes
        return
    try:
        server = Server(probes, host, port)
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot listen on {host}:{port} ({exc.strerror}): change IMG2IMG_METRICS_PORT (0 takes a free port), "
            "or IMG2IMG_METRICS_HOST"
        ) from exc
    with server:
        thread = threading.Thread(target=server.serve_forever, name="probes", daemon=True)
        thread.start()
        log.info("metrics_ready", host=host, port=server.server_address[1])
        try:
            yield probes
        finally:
            server.shutdown()
            thread.join()
