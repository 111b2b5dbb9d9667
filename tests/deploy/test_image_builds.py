"""The images' recipes: linted, in step with the package, and with a health check that tells the truth."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

from tests.deploy.tools import tool
from tests.stack import Stack
from tests.valkey import ValkeyServer, free_port

ROOT: Final = Path(__file__).parents[2]
DOCKERFILES: Final = ("gateway.Dockerfile", "worker.Dockerfile")
FINAL_STAGES: Final = {"gateway.Dockerfile": ["gateway"], "worker.Dockerfile": ["proxy", "cpu", "cuda"]}
STAGE: Final = re.compile(r"^FROM (\S+) AS (\S+)$", re.MULTILINE)
COPIED: Final = re.compile(r"^COPY (?!--from)(.+) \S+$", re.MULTILINE)


def _stages(file: str) -> dict[str, str]:
    """Each stage's text, after that of the stage on which it builds."""
    _, *parts = STAGE.split((ROOT / "deploy" / file).read_text())
    texts: dict[str, str] = {}
    for base, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        texts[name] = texts.get(base, "") + text
    return texts


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint_finds_nothing(file: str) -> None:
    """deploy/hadolint.yaml says what is let pass, and why."""
    command = [tool("hadolint"), "--config", "deploy/hadolint.yaml", f"deploy/{file}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("file", DOCKERFILES)
def test_an_image_runs_as_nobody_in_particular_with_a_health_check(file: str) -> None:
    """By a numeric user, which Kubernetes can tell from root, and under an init, which heeds signals."""
    for stage in FINAL_STAGES[file]:
        text = _stages(file)[stage]
        assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "10001:10001"
        assert 'ENTRYPOINT ["tini", "--", "img2img"]' in text
        assert f'healthcheck.py", "{file.partition(".")[0]}"]' in text


@pytest.mark.parametrize("file", DOCKERFILES)
def test_an_image_says_what_it_is(file: str) -> None:
    """Its labels, with the package's own version unless the build gives another."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for stage in FINAL_STAGES[file]:
        text = _stages(file)[stage]
        for label in ("title", "description", "licenses", "version", "revision", "source"):
            assert f"org.opencontainers.image.{label}=" in text, (stage, label)
        assert f"ARG VERSION={project['version']}\n" in text
        assert f'image.licenses="{project["license"]}"' in text


@pytest.mark.parametrize("file", DOCKERFILES)
def test_a_change_of_code_leaves_the_layers_of_dependencies_alone(file: str) -> None:
    """No stage that resolves dependencies has copied anything but what names them."""
    resolving = {name: text for name, text in _stages(file).items() if "--constraint requirements.lock" in text}
    assert resolving
    for name, text in resolving.items():
        before = text[: text.rindex("--constraint requirements.lock")]
        assert COPIED.findall(before) == ["pyproject.toml requirements.lock"], name


@pytest.mark.parametrize("file", DOCKERFILES)
def test_what_an_image_copies_is_there_and_reaches_the_builder(file: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for sources in COPIED.findall((ROOT / "deploy" / file).read_text()) for source in sources.split()}
    assert copied <= allowed
    assert all((ROOT / path).exists() for path in allowed)


def _health(program: str, **variables: str) -> tuple[int, str]:
    environment = {
        "PATH": os.environ["PATH"],
        **{f"IMG2IMG_{name.upper()}": value for name, value in variables.items()},
    }
    command = [sys.executable, "-I", "-S", ROOT / "deploy" / "healthcheck.py", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    return ran.returncode, ran.stderr


def test_a_gateway_and_a_worker_that_run_are_healthy(running: tuple[str, str]) -> None:
    gateway, worker = (address.rpartition(":")[2] for address in running)
    assert _health("gateway", host="0.0.0.0", http_port=gateway) == (0, "")
    assert _health("worker", metrics_port=worker) == (0, "")


def test_a_gateway_with_tls_is_healthy(tmp_path: Path) -> None:
    """Its certificate names the service, not the loopback address."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=img2img.example"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    files = {"tls_cert": str(cert), "tls_key": str(key)}
    with ValkeyServer(tmp_path / "valkey") as server, Stack(server.url, tmp_path, **files) as stack:
        port = stack.gateway().http.rpartition(":")[2]
        assert _health("gateway", http_port=port, **files) == (0, "")
        assert _health("gateway", http_port=port)[0] == 1


def test_who_does_not_answer_is_unhealthy() -> None:
    port = str(free_port())
    code, why = _health("gateway", http_port=port)
    assert code == 1
    assert f"127.0.0.1:{port}" in why


def test_a_worker_that_was_told_to_serve_no_health_is_not_called_unhealthy() -> None:
    assert _health("worker", metrics_port="-1") == (0, "")


def test_a_port_that_nobody_can_know_is_refused_with_its_remedy() -> None:
    code, why = _health("worker", metrics_port="0")
    assert code == 1
    assert "IMG2IMG_METRICS_PORT=0" in why
