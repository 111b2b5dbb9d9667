"""Runs a real Helm on the chart, and finds its way in what it renders."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "helm" / "img2img"
HELMS: Final = ("helm3", "helm4")
BINARIES: Final = ROOT / ".venv" / "helm"
CASES: Final = tuple(sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml")))
RELEASE: Final = "pictures"
NAMESPACE: Final = "imaging"
SECONDS: Final = 60.0
"""For one call of Helm; it takes a tenth of one."""
MINIMAL: Final = {"redis": {"existingSecret": "redis"}, "tenants": {"existingSecret": "tenants"}}
WORKLOADS: Final = ("Deployment", "StatefulSet", "Pod")

Object = dict[str, Any]


class Refused(Exception):
    """Helm would not render; its words are the message."""


class Rendered(list[Object]):
    """All objects of a release."""

    def of(self, *kinds: str) -> list[Object]:
        return [item for item in self if item["kind"] in kinds]

    def named(self, kind: str, name: str) -> Object:
        """The one object of that kind and name."""
        [found] = [item for item in self.of(kind) if item["metadata"]["name"] == name]
        return found

    def pods(self) -> Iterator[tuple[str, Object]]:
        """Name of each workload, and its pod (metadata and spec)."""
        for item in self.of(*WORKLOADS):
            yield item["metadata"]["name"], item if item["kind"] == "Pod" else item["spec"]["template"]

    def containers(self, *, own: bool = True) -> Iterator[tuple[str, Object]]:
        """Where each container is, and the container; with ``own`` none that come from values as they are."""
        for name, pod in self.pods():
            for container in [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]:
                if not own or container["name"] not in ("before", "beside"):
                    yield f"{name}/{container['name']}", container


def helm(program: str, *arguments: str, given: str | None = None) -> str:
    """What the program says.

    Raises:
        Refused: it ended with an error.
        FileNotFoundError: there is no such program: `make setup` gets it.
    """
    done = subprocess.run(
        [BINARIES / program, *arguments], input=given, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def render(program: str = "helm4", values: Object | None = None, *files: Path) -> Rendered:
    """The chart with these files and values on top.

    Raises:
        Refused: by the schema, or by what the chart checks itself.
    """
    options = [word for file in files for word in ("-f", str(file))]
    text = helm(
        program, "template", RELEASE, str(CHART), "-n", NAMESPACE, *options, "-f", "-", given=json.dumps(values or {})
    )
    return Rendered(item for item in yaml.load_all(text, yaml.CSafeLoader) if item)


def render_case(program: str, case: str) -> Rendered:
    return render(program, None, CHART / "ci" / f"{case}-values.yaml")


def environment(container: Object) -> dict[str, Any]:
    """Each variable with its value, or with where it comes from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container.get("env", ())}
