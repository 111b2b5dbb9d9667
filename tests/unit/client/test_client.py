"""Both clients against a real gRPC server whose answers the tests decide."""

import inspect
from pathlib import Path
from typing import Any, cast

import pytest
from client_helpers import AT, LOST, PICTURE, STAMP, Caller, Servicer, chunks, job, status
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2

from img2img.client import (
    AsyncClient,
    AttemptInfo,
    Client,
    ClientError,
    EtaInfo,
    Failure,
    JobInfo,
    JobOptions,
    JobState,
    OutputFormat,
    Sampler,
    Violation,
)
from img2img.images import PictureInfo
from img2img.v1 import img2img_pb2 as pb


async def test_fields_arrive(call: Caller, servicer: Servicer, tmp_path: Path) -> None:
    """Every field arrives, a path as the file's bytes; what was not given stays absent."""
    (tmp_path / "mask.png").write_bytes(b"mask")
    servicer.answers["create"] = [pb.CreateJobResponse(job=job())]
    await call(
        "create",
        prompt="a lion",
        image=b"image",
        mask=tmp_path / "mask.png",
        strength=0.5,
        num_steps=7,
        guidance=None,
        seed=2**64 - 1,
        idempotency_key="mine",
        options=JobOptions(
            priority=3, sampler=Sampler.EULER_A, output_format=OutputFormat.WEBP, not_before=AT, model="sd"
        ),
    )
    sent = servicer.asked[0]
    assert sent.request == pb.Img2ImgRequest(
        prompt="a lion", image=b"image", mask=b"mask", strength=0.5, num_steps=7, seed=2**64 - 1
    )
    assert (sent.idempotency_key, sent.options.priority) == ("mine", 3)
    assert sent.options.sampler == pb.SAMPLER_EULER_A
    assert sent.options.output_format == pb.OUTPUT_FORMAT_WEBP
    assert (sent.options.not_before, sent.options.model) == (STAMP, "sd")
    assert servicer.metadata["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"width": 2**40}, "width"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"prompt": "a\udcff"}, "prompt"),
        ({"options": JobOptions(priority=2**40)}, "options.priority"),
        ({"options": JobOptions(sampler=cast("Any", "magic"))}, "options.sampler"),
        ({"options": JobOptions(output_format=cast("Any", "gif"))}, "options.output_format"),
        ({"options": JobOptions(not_before=AT.replace(tzinfo=None))}, "options.not_before"),
    ],
)
async def test_what_no_message_can_hold_is_refused_as_by_the_service(
    call: Caller, servicer: Servicer, fields: dict[str, Any], field: str
) -> None:
    """With the field and the words that the other front ends have, and nothing is sent."""
    with pytest.raises(ClientError, match=f"'/{field.replace('.', '/')}'") as caught:
        await call("create", **({"prompt": "a lion"} | fields))
    assert (caught.value.code, caught.value.violations[0].field) == ("invalid_request", field)
    assert servicer.asked == []


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("key", ["i2i_a\n", "i2i_ä"])
def test_a_key_that_cannot_be_one_is_told_at_once(kind: type[Client] | type[AsyncClient], key: str) -> None:
    with pytest.raises(ClientError, match="look for line breaks"):
        kind(key=key)


def job_with_all() -> pb.Job:
    """A job whose every part says something."""
    parameters = pb.Parameters(
        prompt="a lion",
        image=pb.PictureInfo(format="PNG", width=4, height=5, size_bytes=6, sha256="cd"),
        num_steps=20,
        strength=1,
        guidance=7.5,
    )
    return job(
        attempt=2,
        seed=9,
        parameters=parameters,
        options=pb.JobOptions(priority=1, sampler=pb.SAMPLER_DDIM, not_before=STAMP, model="sd"),
        eta=pb.Eta(p50=STAMP, p90=STAMP),
        crashes=2,
        history=[pb.PastAttempt(attempt=1, worker="w", start_time=STAMP, end_time=STAMP, error=LOST)],
        timings={"queued": 0.5},
        warnings=["cut"],
        error=pb.JobError(code="engine_failed", message="no luck"),
        result=pb.JobResult(
            media_type="image/png",
            width=1,
            height=2,
            size_bytes=3,
            sha256="ab",
            expire_time=STAMP,
            receipt=pb.Receipt(model="m", weights={"unet": "ef"}, steps=4, versions={"torch": "2"}, rows=0),
        ),
        width=256,
        finish_time=STAMP,
    )


async def test_job_comes_back_plain(call: Caller, servicer: Servicer) -> None:
    """A job is read into plain values, field for field."""
    servicer.answers["get"] = [pb.GetJobResponse(job=job_with_all())]
    found: JobInfo = await call("get", "0-1", wait=2.5)
    assert servicer.asked[0] == pb.GetJobRequest(id="0-1", wait_seconds=2.5)
    assert (found.id, found.state, found.attempt, found.seed) == ("0-1", JobState.SUCCEEDED, 2, 9)
    assert (found.created_at, found.started_at, found.finished_at) == (AT, None, AT)
    assert found.parameters.prompt == "a lion"
    assert found.parameters.image == PictureInfo("PNG", 4, 5, 6, "cd")
    assert found.parameters.negative_prompt is None
    assert found.options == JobOptions(priority=1, sampler=Sampler.DDIM, not_before=AT, model="sd")
    assert found.eta == EtaInfo(AT, AT)
    assert (found.failures, found.crashes, found.interruptions, found.replays) == (0, 2, 0, 0)
    assert found.history == (AttemptInfo(1, "w", AT, AT, Failure("worker_lost", "gone")),)
    assert (found.timings, found.warnings) == ({"queued": 0.5}, ("cut",))
    assert found.error == Failure("engine_failed", "no luck")
    assert found.result is not None
    assert (found.result.size_bytes, found.result.expires_at) == (3, AT)
    receipt = found.result.receipt
    assert receipt is not None
    assert (receipt.model, receipt.weights, receipt.steps, receipt.versions) == ("m", {"unet": "ef"}, 4, {"torch": "2"})
    assert receipt.rows == 0
    assert (found.width, found.height, found.step) == (256, None, None)


async def test_generate_fetches_a_large_picture(call: Caller, servicer: Servicer) -> None:
    """A picture that the answer leaves out is fetched in chunks."""
    servicer.answers["generate"] = [
        pb.GenerateResponse(job=job(), image=b"small"),
        pb.GenerateResponse(job=job()),
    ]
    servicer.answers["result"] = [chunks(PICTURE)]
    assert (await call("generate", prompt="a lion", timeout=5)).data == b"small"
    assert (await call("generate", prompt="a lion", timeout=5)).data == PICTURE
    first, second = (request.idempotency_key for request in servicer.asked[:2])
    assert first != second


async def test_damaged_picture_is_refused(call: Caller, servicer: Servicer) -> None:
    """A picture that is not the announced one is an error, not a broken file."""
    servicer.answers["result"] = [chunks(PICTURE[:-1], announced=PICTURE)]
    with pytest.raises(ClientError) as caught:
        await call("result", "0-1")
    assert caught.value.code == "data_loss"


async def test_plain_words_do_for_names(call: Caller, servicer: Servicer) -> None:
    """As over REST; Python does not check that they are of our own types."""
    servicer.answers |= {"create": [pb.CreateJobResponse(job=job())], "list": [pb.ListJobsResponse()]}
    await call(
        "create", prompt="a lion", options=JobOptions(sampler=cast("Any", "ddim"), output_format=cast("Any", "webp"))
    )
    await call("list", state="failed")
    created, listed = servicer.asked
    assert (created.options.sampler, created.options.output_format) == (pb.SAMPLER_DDIM, pb.OUTPUT_FORMAT_WEBP)
    assert listed.state == pb.JOB_STATE_FAILED


async def test_list_pages(call: Caller, servicer: Servicer) -> None:
    """State, size and page go out; the next page's token comes back, None on the last page."""
    servicer.answers["list"] = [
        pb.ListJobsResponse(jobs=[job()], next_page_token="more"),
        pb.ListJobsResponse(jobs=[job()]),
    ]
    page = await call("list", state=JobState.RUNNING, limit=1)
    assert (len(page.jobs), page.next_page) == (1, "more")
    assert servicer.asked[0] == pb.ListJobsRequest(page_size=1, state=pb.JOB_STATE_RUNNING)
    assert (await call("list", page="more")).next_page is None


async def test_errors_carry_the_services_code(call: Caller, servicer: Servicer) -> None:
    """Code, message, field violations and the advised wait are read from the rich status."""
    violation = error_details_pb2.BadRequest.FieldViolation(field="num_steps", description="too many")
    servicer.answers["create"] = [
        status(
            code_pb2.INVALID_ARGUMENT,
            "num_steps: too many",
            error_details_pb2.ErrorInfo(reason="invalid_request", domain="img2img"),
            error_details_pb2.BadRequest(field_violations=[violation]),
        ),
        status(
            code_pb2.RESOURCE_EXHAUSTED,
            "busy",
            error_details_pb2.ErrorInfo(reason="queue_full", domain="img2img", metadata={"eta_seconds": "40.5"}),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        ),
        status(code_pb2.UNIMPLEMENTED, "what?"),
    ]
    with pytest.raises(ClientError, match="num_steps: too many") as caught:
        await call("create", prompt="x")
    assert caught.value.code == "invalid_request"
    assert caught.value.violations == (Violation("num_steps", "too many"),)
    with pytest.raises(ClientError) as caught:
        await call("create", prompt="x")
    assert (caught.value.code, caught.value.retry_after, caught.value.eta_seconds) == ("queue_full", 1.5, 40.5)
    with pytest.raises(ClientError, match=r"what\?") as caught:
        await call("create", prompt="x")
    assert caught.value.code == "unimplemented"


async def test_replay_answers_with_the_job(call: Caller, servicer: Servicer) -> None:
    """The id goes out, the job comes back."""
    servicer.answers["replay"] = [pb.ReplayJobResponse(job=job(replays=3))]
    assert (await call("replay", "0-1")).replays == 3
    assert servicer.asked == [pb.ReplayJobRequest(id="0-1")]


def test_the_clients_are_twins() -> None:
    """Both have the same methods, with the same parameters."""

    def shape(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"}

    assert shape(Client) == shape(AsyncClient)
