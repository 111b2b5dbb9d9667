"""The reference pages say what the code does: a page that nobody can trust is worse than none."""

import re
from pathlib import Path

import msgspec
import pytest

from gateway.rest import batch, envelope
from img2img import errors
from img2img.errors import most_specific
from img2img.settings import CLIENT_VARIABLES, PREFIX, Settings
from tests import metrics_table

DOCS = Path(__file__).parents[2] / "docs"
TYPES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "switch",
    str | None: "text",
    Path: "path",
    Path | None: "path",
}
SETTING = re.compile(r"^\| `(IMG2IMG_\w+)` \| (\w+) \| (?:`(.+?)`|(none)) \| \S.* \|$", re.MULTILINE)
CODE = re.compile(r"^\| (\d+) \| (\d+) \| `([a-z_]+)` \|", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)")


def test_settings_are_described_in_order_with_type_and_default() -> None:
    """docs/settings.md has exactly the settings that there are."""
    described = SETTING.findall((DOCS / "settings.md").read_text())
    real = [
        (f"{PREFIX}{field.name.upper()}", TYPES[field.type], *_default(field.default))
        for field in msgspec.structs.fields(Settings)
    ]
    assert described == real


def _default(value: object) -> tuple[str, str]:
    if value is None:
        return "", "none"
    return (f"{value:g}" if isinstance(value, float) and value < 1e5 else str(value).lower().removesuffix(".0")), ""


def test_the_clients_variables_are_described() -> None:
    """They begin like settings and are none."""
    text = (DOCS / "settings.md").read_text()
    assert all(f"`{name}`" in text for name in CLIENT_VARIABLES)


def test_cloudflares_codes_are_described() -> None:
    """docs/cloudflare.md has every number that this service answers with, and the error of ours behind it."""
    described = set(CODE.findall((DOCS / "cloudflare.md").read_text()))
    kinds = [errors.Img2ImgError]
    for kind in kinds:
        kinds.extend(child for child in kind.__subclasses__() if child.__module__ == errors.__name__)
    reported = [kind for kind in kinds if "code" in vars(kind) and kind.code not in ("configuration", "lease_lost")]
    real = set()
    for kind in reported:
        dialect = most_specific(envelope.ERRORS, kind)
        real.add((str(dialect.code), str(dialect.status), kind.code))
    for dialect in (envelope.NO_ROUTE, *envelope.HTTP_ERRORS.values()):
        real.add((str(dialect.code), str(dialect.status), "http"))
    assert described == real


def test_the_bounds_of_a_batch_are_described() -> None:
    """The two numbers that a caller has to know."""
    text = (DOCS / "cloudflare.md").read_text()
    assert f"{batch.MAX_REQUESTS} requests" in text
    assert f"{batch.MAX_BYTES // 1024**2} MiB" in text


def test_metrics_are_described() -> None:
    """docs/telemetry.md has exactly the metrics that there are: `make docs` writes their table."""
    text = metrics_table.PAGE.read_text()
    assert metrics_table.page(text) == text
    assert metrics_table.table() in text


@pytest.mark.parametrize("page", ["cloudflare.md", "errors.md", "settings.md", "telemetry.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link names a file of the repository."""
    missing = [link for link, _ in LINK.findall((DOCS / page).read_text()) if not (DOCS / link).exists()]
    assert missing == []
