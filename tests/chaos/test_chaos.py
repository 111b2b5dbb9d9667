"""The fault test for some seconds, and proof that its checks can fail."""

from pathlib import Path

import pytest

from tests.chaos.intensity import quick
from tests.chaos.run import run


@pytest.mark.timeout(300)
async def test_nothing_is_lost_doubled_or_stuck(tmp_path: Path) -> None:
    """Every kind of fault once under load: all that was accepted ends once, for a reason, with its picture."""
    result = await run(quick(seed=1, seconds=12), tmp_path, timed=False)
    assert not result.report, f"{result.report}\n\nlogs: {tmp_path}"
    assert result.counts["accepted"] > 0
    assert result.counts["lost"] == 0
    assert sum(result.counts["faults"].values()) > 0
