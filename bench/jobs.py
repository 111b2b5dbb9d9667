"""Jobs for benchmarks, as the gateway makes them."""

from typing import Any, Final

import msgspec

from img2img.jobs import JobSpec
from img2img.queue import JobQueue
from img2img.queue_types import Lifetime
from img2img.requests import build_request
from img2img.settings import Settings

REQUEST: Final = build_request({"prompt": "a lion", "num_steps": 20, "seed": 1})
FINGERPRINT: Final = REQUEST.fingerprint()
LIFETIME: Final = Lifetime(Settings().max_job_age, Settings().job_retention)


def fresh_spec(account: str = "local", **options: Any) -> JobSpec:
    """A job with an id of its own; ``options`` are those of ``JobOptions``."""
    return JobSpec(
        id=JobQueue.new_id(),
        account=account,
        parameters=REQUEST.parameters,
        options=msgspec.structs.replace(REQUEST.options, **options),
        seed=1,
        fingerprint=FINGERPRINT,
    )
