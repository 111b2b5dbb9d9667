"""A queue server that is made anew from a backup, as docs/operations.md has it: real processes."""

import shutil
from pathlib import Path
from typing import Any

from tests.stack import Stack, ended, eventually, submit
from tests.valkey import ValkeyServer


def test_jobs_of_a_dump_run_on_a_new_server(tmp_path: Path) -> None:
    """It is read where append-only files are off, and those are written from then on."""
    with ValkeyServer(tmp_path / "old", "appendonly yes") as old, Stack(old.url, tmp_path) as stack:
        with stack.gateway().client() as client:
            job = submit(client, prompt="a lion")
        old.client().save()
        (tmp_path / "new").mkdir()
        shutil.copy(tmp_path / "old" / "dump.rdb", tmp_path / "new")
    with ValkeyServer(tmp_path / "new", "appendonly no") as new, Stack(new.url, tmp_path) as stack:
        new.client().config_set("appendonly", "yes")
        eventually(lambda: _is_written(new.client().info("persistence")), "the append-only files are written")
        stack.worker()
        with stack.gateway().client() as client:
            assert ended(client, job["id"])["state"] == "succeeded"
    with (
        ValkeyServer(tmp_path / "new", "appendonly yes") as again,
        Stack(again.url, tmp_path) as stack,
        stack.gateway().client() as client,
    ):
        assert client.get(f"/v1/jobs/{job['id']}").json()["state"] == "succeeded"


def _is_written(persistence: dict[str, Any]) -> bool:
    return not (persistence["aof_rewrite_in_progress"] or persistence["aof_rewrite_scheduled"])
