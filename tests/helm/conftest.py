"""Every case of helm/img2img/ci, rendered once by each Helm."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helm.rendering import CASES, HELMS, Rendered, render_case


@pytest.fixture(scope="session")
def releases() -> dict[tuple[str, str], Rendered]:
    """By Helm and case."""
    wanted = [(program, case) for program in HELMS for case in CASES]
    with ThreadPoolExecutor() as threads:
        return dict(zip(wanted, threads.map(lambda which: render_case(*which), wanted), strict=True))


@pytest.fixture(params=CASES)
def release(request: pytest.FixtureRequest, releases: dict[tuple[str, str], Rendered]) -> Rendered:
    """Each case in turn, as Helm 4 renders it."""
    return releases["helm4", request.param]
