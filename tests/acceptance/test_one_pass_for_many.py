"""A diffusion worker runs several jobs at once: each gets the picture that it gets alone."""

from typing import Any

import pytest

from tests.stack import Stack, ended, eventually, submit

LONG: dict[str, Any] = {"width": 384, "height": 384, "num_steps": 20}
"""Each takes long enough for all of them to be seen at work."""
JOBS: tuple[dict[str, Any], ...] = (
    {"prompt": "a lion", "seed": 1, **LONG},
    {"prompt": "a rocket", "seed": 2, "guidance": 1.0, **LONG, "options": {"sampler": "ddim"}},
    {"prompt": "a panda", "seed": 3, **LONG, "options": {"sampler": "euler_a", "priority": 5}},
)


def reproducible(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "options": {**job.get("options", {}), "reproducible": True}}


@pytest.mark.timeout(600)
def test_jobs_that_share_a_worker_get_their_own_pictures(stack: Stack) -> None:
    stack.worker(engine="diffusion", device="cpu", max_rows="6", reproducible_rows="6", progress_interval="0")
    with stack.gateway().client() as client:

        def receipt(job_id: str) -> dict[str, Any]:
            job = ended(client, job_id)
            assert job["state"] == "succeeded", job
            made: dict[str, Any] = job["result"]["receipt"]
            return made

        alone = [receipt(submit(client, **reproducible(job))["id"]) for job in JOBS]
        ids = [submit(client, **reproducible(job))["id"] for job in JOBS]
        running = {"state": "running", "limit": 10}
        eventually(
            lambda: len(client.get("/v1/jobs", params=running).json()["jobs"]) == len(JOBS), "all of them run at once"
        )
        together = [receipt(job_id) for job_id in ids]

    assert together == alone
