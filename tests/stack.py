"""Real processes for tests: gateways and workers on one Valkey server, on free ports of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

MODEL_PATH = "/client/v4/accounts/{account}/ai/run/@cf/runwayml/stable-diffusion-v1-5-img2img"
START_SECONDS = 120.0
TERMINAL = ("succeeded", "failed", "canceled", "expired")
T = TypeVar("T")
DOG = Path(__file__).parents[1] / "examples" / "dog.png"


def eventually(condition: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """Wait until ``condition`` holds, and fail with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


class Process:
    """A child whose JSON log is kept in a file; ``ready`` is the event that says it is up."""

    def __init__(self, module: str, ready: str, environment: dict[str, str], log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as stream:
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**os.environ, **environment, "IMG2IMG_LOG_FORMAT": "json"},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self._ready = ready
        self._is_asked = False

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self) -> dict[str, Any]:
        """What it says when it is up; one that does not come up is ended, and fails the test with its log."""

        def look() -> dict[str, Any] | None:
            assert self._child.poll() is None, f"exited {self._child.returncode}"
            return next((entry for entry in self.entries() if entry.get("event") == self._ready), None)

        try:
            return eventually(look, self._ready, START_SECONDS) or {}
        except AssertionError as exc:
            self.close()
            raise AssertionError(f"{exc}:\n{self.log.read_text()}") from exc

    def entries(self) -> list[dict[str, Any]]:
        found = []
        for line in self.log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def wait(self, seconds: float = 60.0) -> int:
        return self._child.wait(seconds)

    def terminate(self) -> None:
        """Ask it to stop, once."""
        if self._child.poll() is None and not self._is_asked:
            self._is_asked = True
            self._child.terminate()

    def close(self) -> None:
        self.terminate()
        try:
            self._child.wait(40)
        except subprocess.TimeoutExpired:
            self.kill()


class Gateway(Process):
    """A gateway with its addresses."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        super().__init__("gateway", "gateway_ready", environment, log)
        ready = self.wait_ready()
        self.http = f"http://127.0.0.1:{ready['http_port']}"
        self.grpc = f"127.0.0.1:{ready['grpc_port']}"
        self.scaler = f"127.0.0.1:{ready['scaler_port']}" if ready["scaler_port"] is not None else None

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.http, timeout=60, trust_env=False, **options)


class Stack:
    """Gateways and workers that are ended together when the block is left."""

    def __init__(self, redis_url: str, folder: Path, **settings: str) -> None:
        self._folder = folder
        ports = dict.fromkeys(("http_port", "grpc_port", "metrics_port"), "0")
        self._settings = {"redis_url": redis_url, "engine": "fake", **ports, **settings}
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # All of them first: a test that runs out of time here leaves none running.
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.close()

    def gateway(self, **settings: str) -> Gateway:
        gateway = Gateway(self._environment(settings), self._log("gateway"))
        self._processes.append(gateway)
        return gateway

    def worker(self, **settings: str) -> Process:
        return self.workers(1, **settings)[0]

    def workers(self, count: int, **settings: str) -> list[Process]:
        """Started together, which takes less time than one after another."""
        workers = []
        for _ in range(count):
            worker = Process("worker", "worker_ready", self._environment(settings), self._log("worker"))
            self._processes.append(worker)
            workers.append(worker)
        for worker in workers:
            worker.wait_ready()
        return workers

    def _environment(self, settings: dict[str, str]) -> dict[str, str]:
        return {f"IMG2IMG_{name.upper()}": value for name, value in {**self._settings, **settings}.items()}

    def _log(self, kind: str) -> Path:
        return self._folder / f"{kind}-{len(self._processes)}.log"


def submit(client: httpx.Client, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    """A job made through the native API."""
    answer = client.post("/v1/jobs", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def state_of(client: httpx.Client, job_id: str) -> str:
    return client.get(f"/v1/jobs/{job_id}").json()["state"]


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job, when it has ended, whichever way; however slow the machine is, within the time of a test."""

    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}", params={"wait": 30}).raise_for_status().json()
        return job if job["state"] in TERMINAL else None

    return eventually(look, f"job {job_id} ends", 120.0) or {}
