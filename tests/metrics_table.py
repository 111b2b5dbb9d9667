"""The table of metrics in docs/telemetry.md, from their declarations: `make docs` writes it."""

import re
from pathlib import Path
from typing import Final

from prometheus_client.metrics import MetricWrapperBase

from img2img import telemetry

PAGE: Final = Path(__file__).parents[1] / "docs" / "telemetry.md"
SECTION: Final = re.compile(r"(<!-- metrics: .*? -->\n).*?(<!-- /metrics -->)", re.DOTALL)
HEAD: Final = "| metric | type | labels | unit | of | meaning |\n|---|---|---|---|---|---|\n"


def declared() -> list[MetricWrapperBase]:
    """Every metric of ours, in the order of the declarations."""
    return [value for value in vars(telemetry).values() if isinstance(value, MetricWrapperBase)]


def shown_by(metric: MetricWrapperBase) -> list[str]:
    """Which processes show it."""
    registries = {"gateway": telemetry.GATEWAY, "worker": telemetry.WORKER}
    return [name for name, registry in registries.items() if metric in registry._collector_to_names]


def table() -> str:
    """The rows, in Markdown."""
    return HEAD + "".join(map(_row, declared()))


def page(text: str) -> str:
    """The page's text with the table as it should be."""
    return SECTION.sub(lambda found: found[1] + table() + found[2], text)


def _row(metric: MetricWrapperBase) -> str:
    (family,) = metric.describe()
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "-"
    where = ", ".join(shown_by(metric))
    return f"| `{name}` | {family.type} | {labels} | {family.unit or '-'} | {where} | {family.documentation} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
