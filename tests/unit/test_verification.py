"""Repeating a reproducible job: what is asked for, what is refused, and what a comparison says."""

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from img2img.cli.verify import verdict
from img2img.client import ClientError, JobInfo, JobOptions, OutputFormat, ResultInfo, Sampler, compare, repetition
from img2img.images import PictureInfo
from img2img.jobs import Failure, JobState, Receipt
from img2img.requests import Parameters

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FILE = b"a picture"
INPUT = PictureInfo("PNG", 64, 48, len(FILE), sha256(FILE).hexdigest())
RECEIPT = Receipt(
    pixels_sha256="ab" * 32,
    model="m",
    revision="r",
    weights={"unet": "u", "vae": "v"},
    sampler="euler",
    steps=4,
    rows=2,
    precision="float32",
    device="cpu",
    versions={"torch": "2.13.0"},
)


def job_of(receipt: Receipt | None = RECEIPT, sha: str = "cd" * 32, **fields: Any) -> JobInfo:
    parameters = Parameters(prompt="a lion", negative_prompt="dull", **fields)
    options = JobOptions(
        priority=3, deadline_seconds=9, sampler=Sampler.EULER, output_format=OutputFormat.WEBP, output_quality=50,
        not_before=NOW, reproducible=True, previews=True, model="sd",
    )  # fmt: skip
    result = ResultInfo(
        media_type="image/webp", width=512, height=256, size_bytes=3, sha256=sha, expires_at=NOW, receipt=receipt
    )
    return JobInfo(
        id="0-1", state=JobState.SUCCEEDED, attempt=1, parameters=parameters, options=options, seed=7, created_at=NOW,
        expires_at=NOW, result=result,
    )  # fmt: skip


def test_a_repetition_asks_for_the_size_and_seed_that_were_used() -> None:
    """And for what shapes the picture; not for what said when and how the first one should be made."""
    assert repetition(job_of(num_steps=5, strength=0.5, guidance=2.0)) == {
        "prompt": "a lion",
        "negative_prompt": "dull",
        "image": None,
        "mask": None,
        "width": 512,
        "height": 256,
        "num_steps": 5,
        "strength": 0.5,
        "guidance": 2.0,
        "seed": 7,
        "options": JobOptions(
            sampler=Sampler.EULER, output_format=OutputFormat.WEBP, output_quality=50, reproducible=True, model="sd"
        ),
    }


def test_inputs_are_those_of_the_job(tmp_path: Path) -> None:
    """Given as bytes or as a file; a record without a digest is compared by its length."""
    (tmp_path / "mask.png").write_bytes(FILE)
    old = msgspec.structs.replace(INPUT, sha256="")

    asked = repetition(job_of(image=INPUT, mask=old), image=FILE, mask=tmp_path / "mask.png")

    assert (asked["image"], asked["mask"]) == (FILE, FILE)


@pytest.mark.parametrize(
    ("recorded", "given", "message"),
    [
        (INPUT, None, "had 'image' (PNG of 64x48, 9 bytes, SHA-256 "),
        (INPUT, b"another", "'image' (7 bytes, SHA-256 "),
        (msgspec.structs.replace(INPUT, sha256=""), b"another", "is another file than job 0-1 had"),
        (None, FILE, "Job 0-1 had no 'image': leave it out"),
    ],
)
def test_another_input_is_refused(recorded: PictureInfo | None, given: bytes | None, message: str) -> None:
    with pytest.raises(ClientError) as caught:
        repetition(job_of(image=recorded), image=given)

    assert message in caught.value.message
    assert caught.value.code == "invalid_image"


@pytest.mark.parametrize("receipt", [None, msgspec.structs.replace(RECEIPT, rows=None)])
def test_a_job_without_the_promise_cannot_be_verified(receipt: Receipt | None) -> None:
    with pytest.raises(ClientError, match="was not made with 'reproducible'") as caught:
        repetition(job_of(receipt))

    assert caught.value.code == "not_reproducible"


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (JobState.RUNNING, None, "Job 0-1 is running, without a picture: wait for its end"),
        (JobState.FAILED, Failure("engine_failed", "no luck"), "Job 0-1 is failed, without a picture: no luck"),
    ],
)
def test_a_job_without_a_picture_cannot_be_verified(state: JobState, error: Failure | None, message: str) -> None:
    job = msgspec.structs.replace(job_of(), state=state, error=error, result=None)

    with pytest.raises(ClientError) as caught:
        repetition(job)

    assert (caught.value.code, caught.value.message) == ("not_reproducible", message)


def test_a_comparison_has_every_fact() -> None:
    facts = compare(job_of(), job_of()).facts

    assert [fact.name for fact in facts] == [
        "pixels_sha256", "model", "revision", "weights.unet", "weights.vae", "sampler", "steps", "precision", "device",
        "versions.torch", "rows", "size", "file_sha256",
    ]  # fmt: skip
    assert all(fact.same for fact in facts)


@pytest.mark.parametrize(
    ("changes", "sha", "same", "causes", "said"),
    [
        ({}, "cd" * 32, (True, True), (), "The pixels are the same."),
        (
            {"versions": {"torch": "2.14.0"}},
            "ee" * 32,
            (True, False),
            ("versions.torch",),
            "The pixels are the same; the files differ.",
        ),
        (
            {"pixels_sha256": "ee" * 32, "device": "cuda", "versions": {"torch": "2.13.0", "xformers": "1"}},
            "ee" * 32,
            (False, False),
            ("device", "versions.xformers"),
            "The pixels differ; so do device, versions.xformers, which explains it.",
        ),
        (
            {"pixels_sha256": "ee" * 32},
            "ee" * 32,
            (False, False),
            (),
            "The pixels differ, and nothing explains it: the same things made both pictures.",
        ),
    ],
)
def test_a_comparison_tells_pixels_from_causes(
    changes: dict[str, Any], sha: str, same: tuple[bool, bool], causes: tuple[str, ...], said: str
) -> None:
    comparison = compare(job_of(), job_of(msgspec.structs.replace(RECEIPT, **changes), sha))

    assert (comparison.same_pixels, comparison.same_file) == same
    assert comparison.causes == causes
    assert verdict(comparison) == said
