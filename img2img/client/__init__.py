"""The Python client of the gRPC service, once for plain code and once for asyncio.

    with Client("127.0.0.1:50051") as client:
        picture = client.generate(prompt="a lion", image=Path("dog.png"), strength=0.9, timeout=60)
        Path("lion.png").write_bytes(picture.data)

Both take the same arguments, return the same plain values and raise :class:`ClientError`.
"""

from img2img.client.aio import AsyncClient
from img2img.client.channel import DEFAULT_SERVER
from img2img.client.sync import Client
from img2img.client.values import (
    AttemptInfo,
    ClientError,
    EtaInfo,
    Event,
    JobInfo,
    JobPage,
    MoveInfo,
    Picture,
    RequestFields,
    ResultInfo,
    Violation,
)
from img2img.client.verification import Compared, Comparison, compare, repetition
from img2img.jobs import Failure, JobState, PreviewPicture, Receipt, UpstreamCall
from img2img.requests import JobOptions, OutputFormat, Parameters, Sampler

__all__ = [
    "DEFAULT_SERVER",
    "AsyncClient",
    "AttemptInfo",
    "Client",
    "ClientError",
    "Compared",
    "Comparison",
    "EtaInfo",
    "Event",
    "Failure",
    "JobInfo",
    "JobOptions",
    "JobPage",
    "JobState",
    "MoveInfo",
    "OutputFormat",
    "Parameters",
    "Picture",
    "PreviewPicture",
    "Receipt",
    "RequestFields",
    "ResultInfo",
    "Sampler",
    "UpstreamCall",
    "Violation",
    "compare",
    "repetition",
]
