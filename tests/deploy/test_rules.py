"""The alerts: each fires when it should and not otherwise, says what to do, and asks for series that there are."""

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.deploy.measured import Series, mistakes, recorded

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "deploy" / "prometheus"


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS: Final = {rule["alert"]: rule for rule in _rules() if "alert" in rule}


def _promtool(*arguments: str) -> str:
    ran = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_promtool_takes_the_configuration_and_its_rules() -> None:
    assert "SUCCESS" in _promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_in_its_case_and_is_silent_in_the_others() -> None:
    """rules.test.yml, by promtool."""
    assert "SUCCESS" in _promtool("test", "rules", "rules.test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_case_in_which_it_fires_and_one_in_which_not(alert: str) -> None:
    cases = yaml.safe_load((FOLDER / "rules.test.yml").read_text())["tests"]
    fires = {
        bool(check["exp_alerts"]) for case in cases for check in case["alert_rule_test"] if check["alertname"] == alert
    }
    assert fires == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(alert: str) -> None:
    """Its runbook is a heading of docs/runbooks.md."""
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{alert.lower()}"
    assert re.search(rf"^## {alert}$", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE)


def test_every_runbook_has_an_alert_and_the_same_four_parts() -> None:
    text = (ROOT / "docs" / "runbooks.md").read_text()
    books = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [book.partition("\n")[0] for book in books] == list(ALERTS)
    for book in books:
        assert re.findall(r"^\*\*(.+?)\*\*", book, re.MULTILINE) == ["Meaning.", "Look.", "Likely.", "Do."], book


def test_rules_name_series_and_labels_that_a_scrape_has(exposed: dict[str, Series]) -> None:
    """Against what a real gateway and a real worker expose, and what the recording rules add."""
    known = exposed | recorded(_rules())
    found = {rule.get("alert", rule.get("record")): mistakes(rule["expr"], known) for rule in _rules()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
