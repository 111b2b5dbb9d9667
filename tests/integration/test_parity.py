"""Every front end builds the same job, or gives the same error, from the same request."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from gateway.rpc.messages import FORMATS, SAMPLERS
from img2img.requests import OutputFormat, Sampler
from img2img.schema import INPUT_SCHEMA
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import run_path
from tests.parity_cases import ERRORS, FRONT_ENDS, JOBS, ROUTED, Case, write_pools
from tests.stack import Gateway, Stack

BOUNDARY = "parity"


class Answer(msgspec.Struct, frozen=True):
    """A job's id, or an error; the Cloudflare dialect has no machine-readable ``field``."""

    job: str | None = None
    code: str | None = None
    field: str | None = None
    reason: str = ""


@pytest.fixture(scope="module")
def gateway(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("stack")
    with Stack(valkey_url, folder) as stack:
        gateway = stack.gateway(pools_file=write_pools(folder / "pools.toml", ROUTED))
        stack.worker(concurrency="8")
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture(scope="module")
def stub(gateway: Gateway) -> Iterator[Any]:
    with grpc.insecure_channel(gateway.grpc) as channel:
        yield Img2ImgServiceStub(channel)


def json_body(case: Case) -> bytes:
    fields = {name: list(value) if isinstance(value, bytes) else value for name, value in case.fields.items()}
    return json.dumps(fields if case.options is None else fields | {"options": case.options}).encode()


def form_body(case: Case) -> bytes:
    """A form by hand: HTTP libraries would not send what some cases are about."""
    parts = []
    options = {} if case.options is None else {"options": case.options}
    for name, value in (case.fields | options).items():
        is_text = INPUT_SCHEMA["properties"].get(name, {}).get("type") == "string"
        filename = f'; filename="{name}"' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else (value if is_text else json.dumps(value)).encode()
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def messages(case: Case) -> pb.CreateJobRequest:
    options = dict(case.options or {})
    if "sampler" in options:
        options["sampler"] = SAMPLERS[Sampler(options["sampler"])]
    if "output_format" in options:
        options["output_format"] = FORMATS[OutputFormat(options["output_format"])]
    if "not_before" in options:
        stamp = Timestamp()
        stamp.FromJsonString(options["not_before"])
        options["not_before"] = stamp
    return pb.CreateJobRequest(
        request=pb.Img2ImgRequest(**case.fields), options=pb.JobOptions(**options), idempotency_key=case.name
    )


def ask(front_end: str, case: Case, client: httpx.Client, stub: Any) -> Answer:
    """Send the case, with its name as the idempotency key."""
    headers = {"idempotency-key": case.name}
    match front_end:
        case "cloudflare":
            return from_cloudflare(client.post(run_path(), content=json_body(case), headers=headers))
        case "json":
            return from_native(client.post("/v1/jobs", content=json_body(case), headers=headers))
        case "form":
            headers["content-type"] = f"multipart/form-data; boundary={BOUNDARY}"
            return from_native(client.post("/v1/jobs", content=form_body(case), headers=headers))
    return from_grpc(stub, messages(case))


def from_cloudflare(answer: httpx.Response) -> Answer:
    if answer.status_code == 200:
        return Answer(job=answer.headers["img2img-job-id"])
    message = answer.json()["errors"][0]["message"]
    for prefix in ("AiError: Bad input: Error: ", "AiError: Invalid or incomplete input for the model: "):
        message = message.removeprefix(prefix)
    return Answer(code=answer.headers["img2img-error"], reason=message.rpartition(" (")[0])


def from_native(answer: httpx.Response) -> Answer:
    body = answer.json()
    if answer.is_success:
        return Answer(job=body["id"])
    return Answer(code=body["code"], field=body.get("field"), reason=body["detail"])


def from_grpc(stub: Any, message: pb.CreateJobRequest) -> Answer:
    try:
        return Answer(job=stub.CreateJob(message, timeout=60).job.id)
    except grpc.RpcError as exc:
        status = rpc_status.from_call(exc)
    info, wrong = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(wrong)
    (violation,) = wrong.field_violations
    return Answer(code=info.reason, field=violation.field, reason=violation.description)


def speaking(case: Case) -> list[str]:
    return [front_end for front_end in FRONT_ENDS if front_end not in case.cannot]


@pytest.mark.parametrize("case", JOBS, ids=lambda case: case.name)
def test_the_same_request_is_the_same_job(case: Case, client: httpx.Client, stub: Any) -> None:
    """One idempotency key for all front ends: a request that differed in anything would be a conflict."""
    answers = {front_end: ask(front_end, case, client, stub) for front_end in speaking(case)}
    jobs = {answer.job for answer in answers.values()}
    assert len(jobs) == 1, answers
    assert None not in jobs, answers
    job = client.get(f"/v1/jobs/{jobs.pop()}").json()
    shown = {name: value for name, value in case.shown.items() if value is not ...}
    assert {name: job["parameters"][name] for name in shown} == shown
    assert job["options"] == (case.options or {})
    assert any((case.warning or "") in warning for warning in job["warnings"]) == (case.warning is not None)


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.name)
def test_the_same_mistake_is_the_same_error(case: Case, client: httpx.Client, stub: Any) -> None:
    """The same code, field and sentence, whichever way the request came."""
    answers = {front_end: ask(front_end, case, client, stub) for front_end in speaking(case)}
    assert {answer.code for answer in answers.values()} == {case.code}, answers
    assert {answer.field for name, answer in answers.items() if name != "cloudflare"} <= {case.field}, answers
    assert len({answer.reason for answer in answers.values()}) == 1, answers


@pytest.mark.parametrize("case", [case for case in JOBS + ERRORS if "grpc" in case.cannot], ids=lambda case: case.name)
def test_what_grpc_is_said_to_be_unable_to_say_it_cannot_say(case: Case) -> None:
    """The exceptions are real ones: the message cannot be built, or is another one."""
    try:
        message = messages(case)
    except (TypeError, ValueError):
        return
    part, fields = (message.options, case.options) if case.options else (message.request, case.fields)
    assert any(not part.HasField(name) or type(getattr(part, name)) is not type(fields[name]) for name in fields)


def test_the_table_is_large_enough() -> None:
    """At least sixty requests, each under a name of its own, and no exception without its reason."""
    cases = JOBS + ERRORS
    assert len({case.name for case in cases}) == len(cases) >= 60
    assert all(set(case.cannot) < set(FRONT_ENDS) and all(case.cannot.values()) for case in cases)
