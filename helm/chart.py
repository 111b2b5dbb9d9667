"""What of the chart is made from something else: `make chart` writes it, tests/helm see that it is fresh.

- ``values.schema.json``: its ``settings``, from img2img/settings.py;
- ``README.md``: the text of ``README.head.md`` beside this file and the tables of values, from the lines of
  ``values.yaml`` that begin with ``# --`` and from the schema's descriptions of pools and routes;
- ``files/``: alerts and dashboard, from deploy/.
"""

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from img2img.settings import CHOICES, MAX_SECONDS, NOT_NEGATIVE, POSITIVE, Settings

CHART: Final = Path(__file__).parent / "img2img"
DEPLOY: Final = CHART.parents[1] / "deploy"
COPIES: Final = {
    CHART / "files" / "rules.yml": DEPLOY / "prometheus" / "rules.yml",
    CHART / "files" / "dashboard.json": DEPLOY / "grafana" / "dashboard.json",
}
DECIDED: Final = frozenset(
    (
        "redis_url", "blobs", "queue", "pools_file", "host", "http_port", "grpc_port", "tenants_file", "tls_cert",
        "tls_key", "drain_timeout", "engine", "model", "log_format", "upstream_account", "upstream_token",
        "upstream_accounts_file", "metrics_host", "metrics_port", "scaler_port", "scaler_tls_cert", "scaler_tls_key",
        "scaler_client_ca", "scaler_target_seconds",
    )
)  # fmt: skip
"""Settings that the chart itself gives, from other values."""
TYPES: Final = {str: "string", int: "integer", float: "number", bool: "boolean"}
KEY: Final = re.compile(r"( *)([A-Za-z]\w*):(.*)")
DESCRIPTION: Final = re.compile(r" *# -- (.*)")


def settings_schema() -> dict[str, Any]:
    """The JSON schema of ``settings``: every field of Settings but those that the chart decides."""
    fields = {field.name: field.type for field in msgspec.structs.fields(Settings) if field.name not in DECIDED}
    properties = {name: _setting_schema(name, kind) for name, kind in fields.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _setting_schema(name: str, kind: Any) -> dict[str, Any]:
    base = next(part for part in kind.__args__ if part is not type(None)) if isinstance(kind, types.UnionType) else kind
    schema: dict[str, Any] = {"type": TYPES[base]}
    if name in CHOICES:
        schema = {"enum": list(CHOICES[name])}
    if name in POSITIVE:
        schema["exclusiveMinimum"] = 0
    if name in NOT_NEGATIVE:
        schema["minimum"] = 0
    if base is float:
        schema["maximum"] = MAX_SECONDS
    return schema


def schema() -> str:
    """``values.schema.json`` as it should be."""
    content = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    content["$defs"]["settings"] = settings_schema()
    return json.dumps(content, indent=2) + "\n"


def described_values() -> Iterator[tuple[str, str]]:
    """Path and description of each value of ``values.yaml`` that has one, in the order of the file."""
    path: list[tuple[int, str]] = []
    description = ""
    for line in (CHART / "values.yaml").read_text("utf-8").splitlines():
        if found := DESCRIPTION.fullmatch(line):
            description = found[1]
        elif found := KEY.fullmatch(line):
            indent = len(found[1])
            path = [(depth, name) for depth, name in path if depth < indent] + [(indent, found[2])]
            if description:
                yield ".".join(name for _, name in path), description
            description = ""


def readme() -> str:
    """``README.md`` as it should be."""
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    kinds = json.loads((CHART / "values.schema.json").read_text("utf-8"))["$defs"]
    parts = [
        (CHART.parent / "README.head.md").read_text("utf-8"),
        "## Values\n",
        "| value | default | meaning |",
        "|---|---|---|",
    ]
    parts += [f"| `{path}` | {_default(values, path)} | {text} |" for path, text in described_values()]
    for kind, title, also in (
        ("pool", "A pool", "and any field of `poolDefaults`"),
        ("route", "A route", "as in docs/pools.md"),
    ):
        parts += [f"\n### {title}\n", f"These fields, {also}.\n", "| field | meaning |", "|---|---|"]
        for name, field in kinds[kind]["properties"].items():
            if "description" in field:
                needed = " (needed)" if name in kinds[kind]["required"] else ""
                parts.append(f"| `{name}`{needed} | {field['description']} |")
    return "\n".join(parts) + "\n"


def _default(values: Any, path: str) -> str:
    for name in path.split("."):
        values = values[name]
    return f"`{json.dumps(values)}`"


def made() -> dict[Path, str]:
    """Every file that is made from something else, as it should be."""
    copies = {copy: original.read_text("utf-8") for copy, original in COPIES.items()}
    return {CHART / "values.schema.json": schema(), CHART / "README.md": readme(), **copies}


def main() -> None:
    """Write everything; with ``--check`` nothing, and exit code 1 if something is not as it should be."""
    if sys.argv[1:] == ["--check"]:
        stale = [path.name for path, text in made().items() if not path.is_file() or path.read_text("utf-8") != text]
        sys.exit(f"{', '.join(stale)}: run `make chart`" if stale else 0)
    for path, text in made().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
