"""What leaves the REST front end when an answer breaks off."""

import re
from typing import Any

import pytest

from gateway.main import UNTRACED
from gateway.rest.measures import AnswerBrokeOff, measured


async def test_an_answer_that_breaks_off_leaves_no_words() -> None:
    """A span would keep them, and they may quote a request."""

    async def app(*_: Any) -> None:
        raise ValueError("a secret prompt")

    scope: Any = {"type": "http", "method": "GET", "path": "/v1/jobs"}
    with pytest.raises(AnswerBrokeOff, match=r"^ValueError$") as caught:
        await measured(app)(scope, app, app)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("address", "untraced"),
    [
        ("http://127.0.0.1:8000/metrics", True),
        ("http://127.0.0.1:8000/health/live", True),
        ("https://img.metrics.svc/health/ready", True),
        ("http://img.metrics.svc/v1/jobs", False),
        ("http://img/client/v4/accounts/metrics/ai/tasks/search", False),
    ],
)
def test_no_name_of_a_host_or_an_account_hides_calls(address: str, untraced: bool) -> None:
    assert any(re.search(pattern, address) for pattern in UNTRACED.split(",")) == untraced
