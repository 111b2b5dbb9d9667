"""The pages for whoever is called at night: what they name is there."""

import json
import re
from pathlib import Path
from typing import Final

import msgspec
import pytest

from img2img.settings import CLIENT_VARIABLES, PREFIX, Settings

ROOT: Final = Path(__file__).parents[2]
RUNBOOKS: Final = ROOT / "docs" / "runbooks.md"
LINK: Final = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in HEADING.findall(page.read_text())}


@pytest.mark.parametrize("page", ["docs/runbooks.md", "deploy/README.md"])
def test_links_lead_to_a_file_and_to_a_heading_of_it(page: str) -> None:
    here = ROOT / page
    for link, anchor in LINK.findall(here.read_text()):
        there = (here.parent / link).resolve() if link else here
        assert there.exists(), link
        assert not anchor or anchor in _anchors(there), f"{link}#{anchor}"


def test_settings_in_the_runbooks_exist() -> None:
    known = {f"{PREFIX}{field.name.upper()}" for field in msgspec.structs.fields(Settings)} | CLIENT_VARIABLES
    assert set(re.findall(r"`(IMG2IMG_\w+)", RUNBOOKS.read_text())) <= known


def test_log_lines_codes_and_fields_in_the_runbooks_occur_in_the_code() -> None:
    code = "".join(
        file.read_text() for folder in ("gateway", "img2img", "worker") for file in (ROOT / folder).rglob("*.py")
    )
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", RUNBOOKS.read_text()))
    assert "watchdog_tripped" in named
    assert {name for name in named if not re.search(rf"\b{name}\b", code)} == set()


def test_panels_in_the_runbooks_are_on_the_dashboard() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
    panels = {panel["title"] for panel in dashboard["panels"]}
    named = set(re.findall(r'"([A-Z][\w ,0-9]+)"', RUNBOOKS.read_text()))
    assert "Work owed" in named
    assert named <= panels
