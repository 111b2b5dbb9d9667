"""``img2img up`` as a user meets it: real processes, a real terminal, real signals."""

import asyncio
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from img2img.client import AsyncClient, Client, JobState
from img2img.up import MAX_CRASHES, Pauses, ServiceFailed, Supervisor, UpOptions
from tests.stack import eventually
from tests.up.running import Terminal, Up, kill, run
from tests.upstream.api import Api
from tests.upstream.running import running_upstream

PNG = b"\x89PNG"
QUICK = Pauses(first=0.01, longest=0.02, steady=60.0)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One running service for the tests that leave it running."""
    with Up(tmp_path_factory.mktemp("up") / "my data") as running:
        yield running
    running.all_gone()


def make_picture(up: Up) -> bytes:
    with Client(up.grpc) as client:
        return client.generate(prompt="a lion", timeout=60).data


def test_the_printed_command_works(up: Up, tmp_path: Path) -> None:
    """The curl command in the ready text makes a picture when it is pasted into a shell."""
    found = re.search(r"^  (curl .*?picture\.png)$", up.text, re.MULTILINE | re.DOTALL)
    assert found, up.text
    subprocess.run(["bash", "-c", found[1]], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_what_is_printed_is_there(up: Up) -> None:
    """The documentation's URL answers, and the children's lines carry their names."""
    found = re.search(r"API docs +(\S+)", up.text)
    assert found, up.text
    assert httpx.get(found[1], trust_env=False, timeout=60, follow_redirects=True).status_code == 200
    assert re.search(r"^gateway \| .*gateway_ready", up.text, re.MULTILINE), up.text
    assert re.search(r"^worker  \| .*worker_ready", up.text, re.MULTILINE), up.text


def test_the_worker_shows_its_metrics(up: Up) -> None:
    """On a free port, which its log names: several workers are on this machine."""
    found = re.search(r"^worker  \| .*metrics_ready.* port=(\d+)", up.text, re.MULTILINE)
    assert found, up.text
    answer = httpx.get(f"http://127.0.0.1:{found[1]}/metrics", trust_env=False, timeout=60)
    assert "img2img_worker_slots" in answer.text


@pytest.mark.parametrize("kind", ["worker", "gateway", "valkey"])
def test_a_killed_child_comes_back(up: Up, kind: str) -> None:
    """Whichever of the three is killed is started again, says so, and the service works as before."""
    job = make_job(up)
    before = up.child(kind)
    kill(before)
    up.shows(f"{kind} ended (killed by SIGKILL): starting it again")
    eventually(lambda: up.child(kind) != before, f"another {kind}")
    eventually(up.is_ready, "readiness")
    assert make_picture(up).startswith(PNG)
    with Client(up.grpc) as client:
        assert client.get(job).state is JobState.SUCCEEDED


def make_job(up: Up) -> str:
    with Client(up.grpc) as client:
        return client.generate(prompt="a lion", timeout=60).job.id


def test_another_service_makes_the_pictures(tmp_path: Path) -> None:
    """With an account and an address, and no model."""
    account = {"IMG2IMG_UPSTREAM_ACCOUNT": "acme", "IMG2IMG_UPSTREAM_TOKEN": "secret"}
    with (
        running_upstream(Api({"acme": "secret"})) as upstream,
        Up(tmp_path, "--engine", "cloudflare", "--upstream", upstream.url, **account) as up,
    ):
        assert make_picture(up).startswith(PNG)
        text = up.text
    assert [(call.account, call.status) for call in upstream.api.calls] == [("acme", 200)]
    assert "secret" not in text


def test_a_second_one_is_refused(up: Up) -> None:
    """The same data folder cannot be used twice: the message names who has it."""
    data_dir = re.search(r"Data +(.+)", up.text)
    assert data_dir, up.text
    second = run("up", "--engine", "fake", "--data-dir", data_dir[1].strip(), "--http-port", "0", "--grpc-port", "0")
    assert second.returncode == 1
    assert f"is used by process {up.pid}: stop it, or choose another with --data-dir" in second.stderr
    assert make_picture(up).startswith(PNG)


@pytest.mark.parametrize("option", ["--http-port", "--grpc-port"])
def test_a_port_in_use(option: str, tmp_path: Path) -> None:
    """A port that is taken is named with its option, before anything is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"--http-port": "0", "--grpc-port": "0", option: port}
        words = [word for pair in ports.items() for word in pair]
        ended = run("up", "--engine", "fake", "--data-dir", str(tmp_path), *words)
    assert ended.returncode == 1
    assert f"Port {port} cannot be used (address already in use)" in ended.stderr
    assert f"choose another with {option}" in ended.stderr
    assert not (tmp_path / "valkey.log").exists()


def test_a_data_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run("up", "--data-dir", str(tmp_path / "file" / "data"), "--http-port", "0", "--grpc-port", "0")
    assert ended.returncode == 1
    assert "cannot be used (Not a directory): choose another with --data-dir" in ended.stderr


def test_a_wrong_setting(tmp_path: Path) -> None:
    """A variable that is no setting is refused before anything is started."""
    ended = run("up", "--data-dir", str(tmp_path), "--http-port", "0", "--grpc-port", "0", IMG2IMG_COLOUR="blue")
    assert ended.returncode == 1
    assert "IMG2IMG_COLOUR" in ended.stderr
    assert not (tmp_path / "valkey.log").exists()


def test_ctrl_c_stops_in_order(tmp_path: Path) -> None:
    """Ctrl-C in the terminal reaches only the command, which stops worker, gateway and Valkey in this order."""
    with Up(tmp_path / "my data") as up:
        up.press_ctrl_c()
        assert up.wait() == 0
        up.all_gone()
        order = [up.text.index(words) for words in ("worker_stopped", "gateway_stopped", "Waiting for valkey to stop")]
        assert order == sorted(order), up.text
        assert "ended" not in up.text


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """While a job holds up the worker's end, a second Ctrl-C ends everything."""
    with Up(tmp_path, IMG2IMG_FAKE_STEP_SECONDS="60", IMG2IMG_DRAIN_TIMEOUT="600") as up, Client(up.grpc) as client:
        job = client.create(prompt="a lion")
        eventually(lambda: client.get(job.id).state is JobState.RUNNING, "the job to run")
        up.press_ctrl_c()
        up.shows("Waiting for worker to stop")
        assert up.child("worker")
        up.press_ctrl_c()
        assert up.wait() == 0
        up.all_gone()


@pytest.mark.parametrize("end", [Terminal.kill, Terminal.hang_up], ids=["kill -9", "closed terminal"])
def test_nothing_is_left_and_the_data_is_kept(tmp_path: Path, end: Callable[[Terminal], None]) -> None:
    """Killed or with its terminal gone, it leaves no process; the next one works on the same data at once."""
    with Up(tmp_path / "my data") as up:
        job = make_job(up)
        end(up)
        up.all_gone()
    with Up(tmp_path / "my data") as again, Client(again.grpc) as client:
        assert client.get(job).state is JobState.SUCCEEDED
        assert client.result(job).startswith(PNG)


def test_several_workers(tmp_path: Path) -> None:
    """``--workers 2`` starts two, told apart by their number."""
    with Up(tmp_path, "--workers", "2") as up:
        for number in (1, 2):
            up.shows(f"worker {number}| ")
        workers = [pid for pid, command in up.processes().items() if command.endswith("-m worker")]
        assert len(workers) == 2


def test_sigterm_is_enough(tmp_path: Path) -> None:
    """SIGTERM, as a service manager sends it, stops everything too."""
    with Up(tmp_path) as up:
        up._process.send_signal(signal.SIGTERM)
        assert up.wait() == 0
        up.all_gone()


def test_the_demo(tmp_path: Path) -> None:
    """The demo makes its picture over Cloudflare's route, tells where the time went, and leaves nothing."""
    with Terminal("demo", "--engine", "fake", "--output", str(tmp_path / "lion.png")) as demo:
        assert demo.wait() == 0, demo.text
        demo.all_gone()
    assert (tmp_path / "lion.png").read_bytes().startswith(PNG)
    assert re.search(r"Where the [\d.]+ s of job \S+ went:\n  queued ", demo.text), demo.text


def test_a_demo_that_is_interrupted_has_failed(tmp_path: Path) -> None:
    """Whoever runs it in a script is told that there is no picture."""
    words = ("demo", "--engine", "fake", "--output", str(tmp_path / "lion.png"))
    with Terminal(*words, IMG2IMG_FAKE_STEP_SECONDS="60") as demo:
        demo.shows("Waiting for the gateway")
        demo.press_ctrl_c()
        assert demo.wait() == 130, demo.text
        demo.all_gone()
    assert not (tmp_path / "lion.png").exists()


class Silence:
    """A report that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def child_line(self, name: str, line: str) -> None:
        pass

    def waiting(self, what: str) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)


async def test_giving_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that crashes five times in a row is given up, with its last words; the others are stopped."""
    monkeypatch.setattr("img2img.up.WORKER_PAUSES", QUICK)
    commands = {"gateway": ("sleep", "1000"), "worker": ("sh", "-c", "echo no luck; exit 3")}
    options = UpOptions(data_dir=tmp_path, http_port=0, grpc_port=0)
    report = Silence()
    with pytest.raises(ServiceFailed, match=r"(?s)worker ended for the 5th time in a row \(exit status 3\).*no luck"):
        async with Supervisor(options, report, commands) as supervisor:
            await supervisor.wait()
    assert len(report.said) == 4


async def test_a_worker_that_has_worked_is_never_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the service was ready a worker is replaced however often it dies: one bad job may kill many."""
    monkeypatch.setattr("img2img.up.WORKER_PAUSES", QUICK)
    options = UpOptions(data_dir=tmp_path, engine="fake", http_port=0, grpc_port=0)
    report = Silence()
    async with Supervisor(options, report) as supervisor:
        await supervisor.ready()
        worker = supervisor.services[-1]
        for crashes in range(1, MAX_CRASHES + 2):
            before = worker.pid
            assert before
            kill(before)
            await asyncio.to_thread(eventually, lambda before=before: worker.pid != before, "another worker")
            assert len(report.said) == crashes
        async with AsyncClient(f"127.0.0.1:{supervisor.options.grpc_port}") as client:
            picture = await client.generate(prompt="a lion", timeout=60)
    assert picture.data.startswith(PNG)


async def test_a_refused_setting_is_not_tried_again(tmp_path: Path) -> None:
    """Exit status 2 means that a setting is wrong: trying again would not help."""
    commands = {"gateway": ("sleep", "1000"), "worker": ("sh", "-c", "echo wrong model; exit 2")}
    options = UpOptions(data_dir=tmp_path, http_port=0, grpc_port=0)
    with pytest.raises(ServiceFailed, match=r"(?s)worker ended \(exit status 2\).*wrong model"):
        async with Supervisor(options, Silence(), commands) as supervisor:
            await supervisor.ready()
