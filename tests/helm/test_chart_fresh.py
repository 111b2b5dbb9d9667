"""What is made from something else is fresh: `make chart` writes it."""

import json
import subprocess
import sys
from typing import Any

import yaml

from tests.helm.rendering import CHART, ROOT, helm


def test_made_files_are_fresh() -> None:
    """README, schema of the settings, alerts and dashboard."""
    done = subprocess.run(
        [sys.executable, ROOT / "helm" / "chart.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_schema_knows_exactly_the_values_that_there_are() -> None:
    """Every value has a place in the schema, and every place a value."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert list(_differences(values, schema, schema["$defs"], "")) == []


def _differences(values: Any, schema: Any, kinds: Any, path: str) -> Any:
    schema = kinds[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    if "properties" not in schema or path in (".settings", ".gateway.settings", ".poolDefaults.settings"):
        return
    known = schema["properties"].keys() - {"global", "claims"}
    yield from (f"{path}.{name}" for name in known ^ values.keys())
    for name in known & values.keys():
        yield from _differences(values[name], schema["properties"][name], kinds, f"{path}.{name}")


def test_helm_has_nothing_to_say_against_the_chart() -> None:
    """`helm lint --strict` of both, with values that it needs."""
    for program in ("helm3", "helm4"):
        said = helm(program, "lint", "--strict", str(CHART), "-f", str(CHART / "ci" / "minimal-values.yaml"))
        assert "0 chart(s) failed" in said
