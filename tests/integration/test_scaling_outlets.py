"""What autoscalers are told: the same over JSON, gRPC and metrics, to operators only, and over mutual TLS."""

import asyncio
import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.scaling import Scaling
from gateway.service import JobService
from img2img.pools import Pools
from img2img.queue_types import ServiceStats
from tests.certificates import Authority
from tests.integration.grpc_gateway import fresh_settings, open_gateway
from tests.keda import Keda
from tests.stack import Gateway, Stack, eventually, submit
from tests.valkey import ValkeyServer

pytestmark = pytest.mark.usefixtures("empty_server")
POOLS = """
[[pools]]
name = "gpu"
engine = "fake"
[[pools]]
name = "burst"
engine = "cloudflare"
calls_per_minute = 60
[[routes]]
pools = ["gpu", "burst"]
classes = ["text-to-image"]
[[routes]]
pools = ["burst"]
classes = ["image-to-image", "inpainting"]
"""
FIELDS = {
    "pool", "backlog_seconds", "demand_seconds", "busy_workers", "workers", "slots", "queued", "running", "updated_at",
}  # fmt: skip
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def tenants_file(folder: Path) -> str:
    """The key of each is its name."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("acme", "keda")}
    path = folder / "tenants.toml"
    path.write_text(
        f'[[tenants]]\naccount = "acme"\nkey_sha256 = ["{digests["acme"]}"]\n'
        f'[[operators]]\nname = "keda"\nkey_sha256 = ["{digests["keda"]}"]\n'
    )
    return str(path)


@pytest.fixture
def gateway(stack: Stack, tmp_path: Path) -> Gateway:
    """Of two pools, without any worker."""
    pools = tmp_path / "pools.toml"
    pools.write_text(POOLS)
    return stack.gateway(scaler_port="0", pools_file=str(pools))


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def keda(gateway: Gateway, **metadata: str) -> Keda:
    assert gateway.scaler is not None
    return Keda(gateway.scaler, **metadata)


def demand_gauges(client: httpx.Client) -> dict[str, float]:
    (family,) = (
        family
        for family in text_string_to_metric_families(client.get("/metrics").text)
        if family.name == "img2img_queue_demand_seconds"
    )
    return {sample.labels["queue"]: sample.value for sample in family.samples}


def test_every_outlet_says_the_same_at_one_moment(gateway: Gateway, client: httpx.Client) -> None:
    for seed in range(3):
        submit(client, prompt="a lion", seed=seed, num_steps=20)

    with keda(gateway, pool="gpu") as scaler:

        def at_one_moment() -> tuple[dict[str, object], float, float] | None:
            before = client.get("/v1/scaling/gpu").json()
            told = before, scaler.metric(), demand_gauges(client)["gpu"]
            return told if client.get("/v1/scaling/gpu").json() == before and before["queued"] == 3 else None

        told, metric, gauge = eventually(at_one_moment, "nothing changes while all three are asked") or ({}, 0, 0)
        assert set(told) == FIELDS
        assert told["demand_seconds"] == told["backlog_seconds"] == metric == gauge == 3.0
        assert (told["queued"], told["running"], told["workers"], told["slots"]) == (3, 0, 0, 0)
        assert scaler.target() == 30.0


def test_calls_upstream_count_and_not_their_seconds(gateway: Gateway, client: httpx.Client, tmp_path: Path) -> None:
    """Workers that wait for an upstream are wanted for the calls that it takes at once."""
    for seed in range(3):
        submit(client, prompt="a lion", seed=seed, image_b64=PIXEL)

    def three_wait() -> dict[str, float] | None:
        told = client.get("/v1/scaling/burst", params={"target_seconds": 128}).json()
        return told if told["queued"] == 3 else None

    # One call a second of an expected second each: one at once, of the 64 of a worker.
    assert eventually(three_wait, "three jobs wait")["demand_seconds"] == 2.0  # type: ignore[index]


def test_what_cannot_be_answered_is_refused_alike(gateway: Gateway, client: httpx.Client) -> None:
    """The same words over JSON and gRPC; the fields have the names that each outlet gives them."""
    unknown = client.get("/v1/scaling/nope")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    for metadata, code, words in (
        ({"pool": "nope"}, grpc.StatusCode.NOT_FOUND, unknown.json()["detail"]),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "'pool' must be the name of one of these: gpu, burst"),
        (
            {"pool": "gpu", "targetSeconds": "0"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "'targetSeconds' must be a number of seconds from 0.001",
        ),
        (
            {"pool": "gpu", "targetSeconds": "soon"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "'targetSeconds' must be a number of seconds from 0.001",
        ),
    ):
        with keda(gateway, **metadata) as scaler:
            for call in (scaler.metric, scaler.is_active, lambda scaler=scaler: next(scaler.pushed())):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert (caught.value.code(), caught.value.details()) == (code, words)  # type: ignore[attr-defined]
    for wrong in ("0", "-1", "nan", "inf"):
        refused = client.get("/v1/scaling/gpu", params={"target_seconds": wrong})
        assert refused.status_code == 400
        assert refused.json()["detail"] == "'target_seconds' must be a number of seconds from 0.001"


def test_activation_is_strictly_above(gateway: Gateway, client: httpx.Client) -> None:
    """As everywhere in KEDA."""
    submit(client, prompt="a lion", num_steps=20)
    with keda(gateway, pool="gpu", activationSeconds="1") as scaler:
        eventually(lambda: scaler.metric() == 1.0, "one second is owed")
        assert not scaler.is_active()
    with keda(gateway, pool="gpu", activationSeconds="0.999") as scaler:
        assert scaler.is_active()


def test_only_operators_are_told(stack: Stack, tmp_path: Path) -> None:
    """A tenant's key is of no use here, and an operator's nowhere else."""
    gateway = stack.gateway(tenants_file=tenants_file(tmp_path))
    with gateway.client() as client:

        def ask(path: str, key: str | None) -> tuple[int, str]:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            answer = client.get(path, headers=headers)
            return answer.status_code, answer.headers.get("img2img-error", "")

        scaling = "/v1/scaling/default"
        assert ask(scaling, "keda") == (200, "")
        assert ask(scaling, None) == (401, "missing_credentials")
        assert ask(scaling, "nobody") == (401, "unauthenticated")
        assert ask(scaling, "acme") == (403, "account_mismatch")
        assert ask("/v1/queue", "keda") == (401, "unauthenticated")


def test_the_scaler_asks_for_a_certificate(stack: Stack, tmp_path: Path) -> None:
    """Of its own authority: KEDA has no other way to say who it is."""
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    cert, key = ours.certificate("gateway")
    gateway = stack.gateway(
        scaler_port="0", scaler_tls_cert=str(cert), scaler_tls_key=str(key), scaler_client_ca=str(ours.path)
    )
    assert gateway.scaler is not None

    def credentials(pair: tuple[Path, Path] | None) -> grpc.ChannelCredentials:
        chain, private = (None, None) if pair is None else (pair[0].read_bytes(), pair[1].read_bytes())
        return grpc.ssl_channel_credentials(ours.path.read_bytes(), private, chain)

    with Keda(gateway.scaler, credentials(ours.certificate("keda")), pool="default") as scaler:
        assert not scaler.is_active()
    for stranger in (None, others.certificate("stranger")):
        with Keda(gateway.scaler, credentials(stranger), pool="default") as scaler:
            with pytest.raises(grpc.RpcError) as caught:
                scaler.is_active()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    with Keda(gateway.scaler, pool="default") as scaler, pytest.raises(grpc.RpcError):
        scaler.is_active()


def test_streams_end_well_with_the_gateway(gateway: Gateway) -> None:
    """After an error KEDA would wait for up to a minute before it opens one elsewhere."""
    with keda(gateway, pool="gpu") as scaler:
        pushed = scaler.pushed()
        assert next(pushed) is False
        gateway.signal(signal.SIGTERM)
        assert list(pushed) == []
    assert gateway.wait() == 0


def test_streams_outlast_a_queue_server_that_was_away(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path / "valkey") as server, Stack(server.url, tmp_path) as stack:
        gateway = stack.gateway(scaler_port="0")
        with gateway.client() as client, keda(gateway, pool="default") as scaler:
            pushed = scaler.pushed()
            assert next(pushed) is False
            server.kill()
            waits = "scaler_stream_waits"
            eventually(lambda: any(entry["event"] == waits for entry in gateway.entries()), "the stream waits")
            with pytest.raises(grpc.RpcError) as caught:
                scaler.metric()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            server.start()
            server.wait_up()
            eventually(lambda: client.post("/v1/jobs", json={"prompt": "a lion"}).status_code == 202, "jobs are taken")
            assert next(pushed) is True


class CountingService(JobService):
    """Counts its trips to the queue server."""

    trips = 0

    async def stats(self) -> ServiceStats:
        self.trips += 1
        return await super().stats()


async def test_everybody_who_asks_at_once_shares_a_trip(valkey_url: str) -> None:
    settings = fresh_settings(valkey_url)
    async with open_gateway(settings, worker=False, make_service=CountingService) as opened:
        scaling = Scaling(opened.service, Pools.single("default", "fake"), settings)
        asked = await asyncio.gather(*(scaling.signal("default", float(target)) for target in range(1, 50)))
        assert len({one.updated_at for one in asked}) == 1
        assert isinstance(opened.service, CountingService)
        assert opened.service.trips == 1


def test_without_a_port_nothing_is_served(stack: Stack) -> None:
    gateway = stack.gateway()
    assert gateway.scaler is None
