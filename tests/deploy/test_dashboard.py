"""The dashboard asks for what there is: a panel whose query names nothing stays empty, and looks like a quiet day."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.deploy.measured import Series, mistakes

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
VARIABLE: Final = re.compile(r"\$\{?(\w+)\}?")
BUILT_IN: Final = {"__rate_interval": "5m"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())


def _panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def _queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Title of the panel and query, with a value in place of Grafana's variables."""
    return [
        (panel["title"], VARIABLE.sub(lambda name: BUILT_IN.get(name[1], ".*"), target["expr"]))
        for panel in _panels(dashboard)
        for target in panel["targets"]
    ]


def test_every_query_names_series_and_labels_that_a_scrape_has(
    dashboard: dict[str, Any], exposed: dict[str, Series]
) -> None:
    """Against what a real gateway and a real worker expose."""
    found = {f"{title}: {query}": mistakes(query, exposed) for title, query in _queries(dashboard)}
    assert {query: wrong for query, wrong in found.items() if wrong} == {}


def test_every_query_is_promql(dashboard: dict[str, Any], tmp_path: Path) -> None:
    """promtool takes each of them as a recording rule."""
    rules = [{"record": f"query:{number}", "expr": query} for number, (_, query) in enumerate(_queries(dashboard))]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_query_is_about_our_own_processes(dashboard: dict[str, Any]) -> None:
    """In a cluster others have CPU and memory, too, and names of metrics in common with us."""
    assert [query for _, query in _queries(dashboard) if "img2img_" not in query] == []


def test_every_variable_of_a_query_is_declared(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = json.dumps(dashboard["panels"])
    assert {name for name in VARIABLE.findall(text) if name not in BUILT_IN} <= variables


def test_the_variables_ask_for_labels_that_a_scrape_has(dashboard: dict[str, Any], exposed: dict[str, Series]) -> None:
    queries = [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    asked = [re.fullmatch(r"label_values\((.+), (\w+)\)", query) for query in queries]
    # What label_values asks for is a selector and a label, like an aggregation over it.
    assert [mistakes(f"max by ({found[2]}) ({found[1]})", exposed) for found in asked if found] == [[], []]


def test_panels_do_not_overlap_and_have_ids_of_their_own(dashboard: dict[str, Any]) -> None:
    assert set(Counter(panel["id"] for panel in dashboard["panels"]).values()) == {1}
    cells: Counter[tuple[int, int]] = Counter()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        rows, columns = range(place["y"], place["y"] + place["h"]), range(place["x"], place["x"] + place["w"])
        cells.update((row, column) for row in rows for column in columns)
    assert set(cells.values()) == {1}


def test_the_provisioned_data_sources_are_those_that_exemplars_lead_to(dashboard: dict[str, Any]) -> None:
    """The dot of a job in a panel opens its trace: Prometheus' data source names Tempo's by its uid."""
    file = DEPLOY / "grafana" / "provisioning" / "datasources" / "datasources.yaml"
    sources = {source["type"]: source for source in yaml.safe_load(file.read_text())["datasources"]}
    exemplars = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplars == [{"name": "trace_id", "datasourceUid": sources["tempo"]["uid"]}]
    assert any(target["exemplar"] for panel in _panels(dashboard) for target in panel["targets"])
