"""Times at the ends of the calendar, and the same time in other words."""

from typing import Any

import grpc

from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceStub
from tests.calls import problem
from tests.parity_cases import ahead
from tests.stack import Stack, submit


def test_a_time_that_utc_does_not_have(stack: Stack) -> None:
    gateway = stack.gateway()
    with gateway.client() as client, grpc.insecure_channel(gateway.grpc) as channel:
        submit(client, prompt="x")
        answer = client.post("/v1/jobs", json={"prompt": "x", "options": {"not_before": "0001-01-01T00:00:00+14:00"}})
        stub: Any = Img2ImgServiceStub(channel)
        assert len(stub.ListJobs(pb.ListJobsRequest()).jobs) == 1
        problem(answer, 400, "invalid_request", "options.not_before")


def test_one_time_in_two_ways(stack: Stack) -> None:
    gateway = stack.gateway()
    with gateway.client() as client:
        ids = {
            submit(client, {"idempotency-key": "k"}, prompt="x", options={"not_before": at})["id"]
            for at in ("2026-01-01T12:00:00Z", "2026-01-01T14:00:00+02:00")
        }
    assert len(ids) == 1


def test_a_deadline_in_the_header_counts_too(stack: Stack) -> None:
    gateway = stack.gateway()
    with gateway.client() as client:
        body = {"prompt": "x", "options": {"not_before": ahead(hours=1)}}
        problem(
            client.post("/v1/jobs", json=body, headers={"deadline": "60"}), 400, "invalid_request", "options.not_before"
        )
