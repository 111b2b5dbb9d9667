"""torch's threads keep to what their container may use, unless somebody says otherwise."""

import os
from pathlib import Path

import pytest

from worker.engines.diffusion.threads import set_threads


@pytest.mark.parametrize(
    ("limit", "given", "threads"),
    [
        ("max 100000\n", {}, None),
        ("200000 100000\n", {}, "2"),
        ("150000 100000\n", {}, "2"),
        ("5000 100000\n", {}, "1"),
        ("800000 100000\n", {}, None),
        ("200000 100000\n", {"OMP_NUM_THREADS": "3"}, "3"),
    ],
)
def test_as_many_threads_as_the_container_has_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, given: dict[str, str], threads: str | None
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "cpu.max").write_text(limit)
    environment = dict(given)
    set_threads(environment, tmp_path / "cpu.max")

    assert environment.get("OMP_NUM_THREADS") == threads


def test_without_a_container_only_how_they_wait(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    set_threads(environment, tmp_path / "cpu.max")

    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}
