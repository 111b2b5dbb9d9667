"""What arq's ``run_job`` asks the server before it runs a job, answered from the claim: no round trip a job."""

from collections.abc import Mapping
from typing import Any, Final, Self

import msgspec
from arq.constants import job_key_prefix

from img2img.queue_types import Claim

FIRST_TRY: Final = 1
"""arq's own count of tries is switched off: attempts are counted by the queue's scripts."""


class ClaimedPayloads:
    """Stands where arq has its connection pool; ``claims`` are those that run, by arq's job id."""

    def __init__(self, claims: Mapping[str, Claim]) -> None:
        self._claims = claims

    def pipeline(self, transaction: bool = True) -> "PayloadPipeline":
        return PayloadPipeline(self._claims)


class PayloadPipeline:
    """The three commands of ``run_job``: the payload, one more try, and how long to remember that."""

    def __init__(self, claims: Mapping[str, Claim]) -> None:
        self._claims = claims
        self._answers: list[object] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""

    def get(self, key: str) -> None:
        claim = self._claims[key.removeprefix(job_key_prefix)]
        payload: dict[str, Any] = {"t": None, "f": "generate", "a": [claim.id], "k": {}, "et": claim.created_at}
        self._answers.append(msgspec.json.encode(payload))

    def incr(self, key: str) -> None:
        self._answers.append(FIRST_TRY)

    def expire(self, key: str, seconds: int) -> None:
        self._answers.append(True)

    async def execute(self) -> list[object]:
        return self._answers
