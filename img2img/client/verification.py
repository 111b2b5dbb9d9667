"""Whether a reproducible job makes the same picture again: what to ask for, and how to compare.

job = client.get(job_id)
again = client.generate(**repetition(job, image=Path("dog.png")))
assert compare(job, again.job).same_pixels
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from img2img.client.values import ClientError, JobInfo, RequestFields, ResultInfo
from img2img.images import PictureInfo
from img2img.jobs import Receipt
from img2img.requests import JobOptions

PIXELS: Final = "pixels_sha256"
FILE: Final = "file_sha256"
OUTCOMES: Final = frozenset({PIXELS, FILE})
"""What is made; the other fields of a comparison are what makes it."""


class Compared(msgspec.Struct, frozen=True):
    """One fact about the pictures of a job and of its repetition; empty where only the other has it."""

    name: str
    job: str
    again: str

    @property
    def same(self) -> bool:
        return self.job == self.again


class Comparison(msgspec.Struct, frozen=True):
    """Two pictures of the same request, fact by fact: the receipts', and the files' SHA-256."""

    facts: tuple[Compared, ...]

    @property
    def same_pixels(self) -> bool:
        return all(fact.same for fact in self.facts if fact.name == PIXELS)

    @property
    def same_file(self) -> bool:
        return all(fact.same for fact in self.facts if fact.name == FILE)

    @property
    def causes(self) -> tuple[str, ...]:
        """What differs of that which makes a picture, such as ``device`` or ``versions.torch``."""
        return tuple(fact.name for fact in self.facts if not fact.same and fact.name not in OUTCOMES)


def repetition(job: JobInfo, image: bytes | Path | None = None, mask: bytes | Path | None = None) -> RequestFields:
    """The request that makes the job's picture again; the service keeps no input, so the caller gives it.

    Raises:
        ClientError: ``not_reproducible``: the job has no picture, or one with no promise that it can be made again;
            ``invalid_image``: an input is missing, superfluous, or another than the job's.
    """
    result, _ = _promise(job)
    asked, options = job.parameters, job.options
    return RequestFields(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        image=_input(job, "image", asked.image, image),
        mask=_input(job, "mask", asked.mask, mask),
        width=result.width,
        height=result.height,
        num_steps=asked.num_steps,
        strength=asked.strength,
        guidance=asked.guidance,
        seed=job.seed,
        options=JobOptions(
            sampler=options.sampler,
            output_format=options.output_format,
            output_quality=options.output_quality,
            reproducible=True,
            model=options.model,
        ),
    )


def compare(job: JobInfo, again: JobInfo) -> Comparison:
    """The pictures of two reproducible jobs, the earlier one first.

    Raises:
        ClientError: ``not_reproducible``, as for :func:`repetition`.
    """
    before, after = (dict(_facts(*_promise(one))) for one in (job, again))
    return Comparison(
        tuple(Compared(name, before.get(name, ""), after.get(name, "")) for name in dict.fromkeys([*before, *after]))
    )


def _promise(job: JobInfo) -> tuple[ResultInfo, Receipt]:
    if job.result is None:
        reason = job.error.message if job.error else "wait for its end"
        raise ClientError("not_reproducible", f"Job {job.id} is {job.state}, without a picture: {reason}")
    receipt = job.result.receipt
    if receipt is None or receipt.rows is None:
        raise ClientError(
            "not_reproducible",
            f"Job {job.id} was not made with 'reproducible': its request makes the same picture again up to rounding "
            "only, which no digest can tell; set 'options.reproducible' when you make one",
        )
    return job.result, receipt


def _facts(result: ResultInfo, receipt: Receipt) -> Iterator[tuple[str, str]]:
    for name, value in msgspec.structs.asdict(receipt).items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", value[key]) for key in sorted(value))
        else:
            yield name, str(value)
    yield "size", f"{result.width}x{result.height}"
    yield FILE, result.sha256


def _input(job: JobInfo, name: str, recorded: PictureInfo | None, given: bytes | Path | None) -> bytes | None:
    """The bytes of an input file, after a look whether they are those that the job had."""
    if recorded is None and given is not None:
        raise ClientError("invalid_image", f"Job {job.id} had no '{name}': leave it out")
    if recorded is None:
        return None
    if given is None:
        raise ClientError("invalid_image", f"Job {job.id} had {_named(name, recorded)}: give that file again")
    data = given.read_bytes() if isinstance(given, Path) else given
    digest = hashlib.sha256(data).hexdigest()
    if digest != (recorded.sha256 or digest) or len(data) != recorded.bytes:
        raise ClientError(
            "invalid_image",
            f"'{name}' ({len(data)} bytes, SHA-256 {digest}) is another file than job {job.id} had: give "
            f"{_named(name, recorded)}",
        )
    return data


def _named(name: str, recorded: PictureInfo) -> str:
    digest = f", SHA-256 {recorded.sha256}" if recorded.sha256 else ""
    return f"'{name}' ({recorded.format} of {recorded.width}x{recorded.height}, {recorded.bytes} bytes{digest})"
