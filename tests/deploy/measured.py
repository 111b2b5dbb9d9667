"""What a gateway and a worker really expose, for the tests of whoever asks for it by name."""

import re
from typing import Final, NamedTuple

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.deploy.promql import parse
from tests.metrics_table import declared as metrics

TARGET: Final = frozenset({"namespace", "job", "instance"})
"""Labels that a series gets where it is scraped."""
SUFFIXES: Final = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}


class Series(NamedTuple):
    """A series' name, and the labels that its makers give it."""

    name: str
    labels: frozenset[str]


def declared() -> dict[str, Series]:
    """All that img2img/telemetry.py declares."""
    found = {}
    for metric in metrics():
        (family,) = metric.describe()
        for suffix in SUFFIXES[family.type]:
            labels = {*metric._labelnames, *(["le"] if suffix == "_bucket" else [])}
            found[family.name + suffix] = Series(family.name + suffix, frozenset(labels))
    return found


def scraped(text: str) -> dict[str, Series]:
    """All that a scrape shows; of families without a sample as yet, what is declared."""
    found, known = {}, declared()
    for family in text_string_to_metric_families(text):
        for suffix in SUFFIXES.get(family.type, ()):
            if family.name + suffix in known:
                found[family.name + suffix] = known[family.name + suffix]
        for sample in family.samples:
            found[sample.name] = Series(sample.name, frozenset(sample.labels))
    return found


def mistakes(expression: str, known: dict[str, Series]) -> list[str]:
    """Names of series and labels in ``expression`` that nothing has."""
    spoken = parse(expression)
    unknown = [f"no series {name}" for name, _ in spoken.selectors if name not in known]
    of_series = {name: known[name].labels | TARGET for name, _ in spoken.selectors if name in known}
    for name, labels in spoken.selectors:
        unknown += [f"{name} has no label {label}" for label in sorted(labels - of_series.get(name, labels))]
    anywhere = frozenset[str]().union(*of_series.values())
    unknown += [f"no series of the query has the label {label}" for label in sorted(spoken.grouped - anywhere)]
    return unknown


RECORDED_BY: Final = re.compile(r"\bby\s*\(([^)]*)\)")


def recorded(rules: list[dict[str, str]]) -> dict[str, Series]:
    """What recording rules add: a series each, with the labels that its expression groups by."""
    return {
        rule["record"]: Series(
            rule["record"],
            frozenset(label for labels in RECORDED_BY.findall(rule["expr"]) for label in re.findall(r"\w+", labels)),
        )
        for rule in rules
        if "record" in rule
    }
