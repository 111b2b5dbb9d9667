"""Reproducible jobs: asked for, or all of a service's; the same bytes again, and a receipt that says from what."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from PIL import Image

from img2img.client import Client, JobOptions, OutputFormat, Receipt, compare, repetition
from tests.calls import run_path
from tests.stack import DOG, Gateway, Stack
from tests.up.running import run

SEED = {"seed": 7, "strength": 0.5}
WAIT = {"prefer": "wait=60"}


@pytest.fixture(scope="module")
def stack(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        stack.worker()
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Gateway:
    return stack.gateway()


@pytest.fixture(scope="module")
def strict(stack: Stack) -> Gateway:
    """A gateway that makes every job reproducible."""
    return stack.gateway(reproducible="true")


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture
def grpc(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.grpc) as client:
        yield client


def finished(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={"prompt": "a lion"} | SEED | body, headers=WAIT)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def by_form(client: httpx.Client, **options: str) -> dict[str, Any]:
    fields = {"prompt": "a lion"} | {name: str(value) for name, value in SEED.items()}
    fields |= {f"options.{name}": value for name, value in options.items()}
    answer = client.post("/v1/jobs", data=fields, files={"image": DOG.read_bytes()}, headers=WAIT)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def file_of(client: httpx.Client, job: dict[str, Any]) -> bytes:
    return client.get(job["links"]["image"]).raise_for_status().content


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_the_same_request_makes_the_same_bytes_on_every_front_end(
    http: httpx.Client, grpc: Client, output_format: str
) -> None:
    """As JSON, as a form and over gRPC, each twice: one file and one receipt."""
    options = {"reproducible": True, "output_format": output_format}
    image = list(DOG.read_bytes())
    jobs = [finished(http, image=image, options=options) for _ in range(2)]
    jobs += [by_form(http, reproducible="true", output_format=output_format) for _ in range(2)]
    given = JobOptions(reproducible=True, output_format=OutputFormat(output_format))
    pictures = [grpc.generate(prompt="a lion", image=DOG, options=given, **SEED) for _ in range(2)]

    files = {file_of(http, job) for job in jobs} | {picture.data for picture in pictures}

    assert len(files) == 1
    assert {job["result"]["sha256"] for job in jobs} == {picture.job.result.sha256 for picture in pictures}
    receipts = [job["result"]["receipt"] for job in jobs]
    assert all(receipt == receipts[0] for receipt in receipts)
    assert receipts[0]["rows"] == 1
    assert pictures[0].job.result.receipt == Receipt(**receipts[0])


def test_a_job_that_does_not_ask_gets_a_receipt_without_the_promise(
    gateway: Gateway, http: httpx.Client, grpc: Client
) -> None:
    """``rows`` is what makes a receipt a promise."""
    job = finished(http, options={})

    assert job["options"] == {}
    assert job["result"]["receipt"]["rows"] is None
    assert grpc.get(job["id"]).result.receipt.rows is None
    assert "reproducible" not in run("jobs", "get", job["id"], IMG2IMG_SERVER=gateway.grpc).stdout


def test_the_file_has_the_same_receipt_as_the_job(http: httpx.Client) -> None:
    """And with it what was asked for, the seed that was drawn, and the digest of the input."""
    body = {"prompt": "a lion", "image": list(DOG.read_bytes()), "options": {"reproducible": True}}
    job = http.post("/v1/jobs", json=body, headers=WAIT).json()

    with Image.open(io.BytesIO(file_of(http, job))) as picture:
        record, parameters = json.loads(picture.info["img2img"]), picture.info["parameters"]

    assert record["receipt"] == job["result"]["receipt"]
    assert (record["parameters"]["seed"], record["parameters"]["image"]) == (job["seed"], job["parameters"]["image"])
    assert f"Seed: {job['seed']}, Size: 256x256, Model hash: fake-1, Model: fake" in parameters


def test_what_only_the_file_says_changes_the_file_and_not_the_pixels(http: httpx.Client) -> None:
    """The quality has no effect on a PNG, and is noted in it all the same: the receipts agree, the files do not."""
    one, other = (finished(http, options={"reproducible": True, "output_quality": quality}) for quality in (50, 51))

    assert one["result"]["receipt"] == other["result"]["receipt"]
    assert one["result"]["sha256"] != other["result"]["sha256"]


def test_a_service_can_make_every_job_reproducible(strict: Gateway) -> None:
    """Cloudflare's dialect, which has no such option, and requests that say no: the record says what was done."""
    with strict.client() as http, Client(strict.grpc) as grpc:
        answer = http.post(run_path(), json={"prompt": "a lion"} | SEED)
        jobs = [http.get(f"/v1/jobs/{answer.headers['img2img-job-id']}").json()]
        jobs += [finished(http), finished(http, options={"reproducible": False}), finished(http, options=None)]
        batch = http.post(f"{run_path()}?queueRequest=true", json={"requests": [{"prompt": "a lion"} | SEED]}).json()
        jobs += http.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
        info = grpc.generate(prompt="a lion", **SEED).job

    assert batch["success"]
    assert [job["options"] for job in jobs] == [{"reproducible": True}] * 5
    assert info.options == JobOptions(reproducible=True)
    assert {job["result"]["sha256"] for job in jobs[:4]} == {info.result.sha256}


def test_metadata_can_be_left_out(stack: Stack) -> None:
    """The receipt is then with the job alone."""
    gateway = stack.gateway(queue="plain")
    stack.worker(queue="plain", image_metadata="false")
    with gateway.client() as http:
        job = finished(http)
        with Image.open(io.BytesIO(file_of(http, job))) as picture:
            assert {"parameters", "img2img"}.isdisjoint(picture.info)
    assert job["result"]["receipt"]["model"] == "fake"


def test_a_job_can_be_repeated_from_python(grpc: Client) -> None:
    """Size and seed were the service's choice: a repetition asks for what it chose."""
    first = grpc.generate(prompt="a lion", image=DOG, options=JobOptions(reproducible=True)).job

    again = grpc.generate(**repetition(first, image=DOG)).job

    assert first.id != again.id
    comparison = compare(first, again)
    assert comparison.same_pixels
    assert comparison.same_file
    assert comparison.causes == ()


class TestVerify:
    """``img2img verify`` from the command line."""

    @pytest.fixture
    def verify(self, gateway: Gateway) -> Any:
        return lambda *words: run("verify", *words, IMG2IMG_SERVER=gateway.grpc)

    @pytest.fixture
    def made(self, gateway: Gateway, tmp_path: Path) -> str:
        """The id of a job that a user made with a picture and the option."""
        words = (
            "generate",
            str(DOG),
            "a lion",
            "-o",
            str(tmp_path / "lion.webp"),
            "--reproducible",
            "--strength",
            "0.5",
        )
        ended = run(*words, IMG2IMG_SERVER=gateway.grpc)
        assert ended.returncode == 0, ended.stderr
        return ended.stderr.split()[-1]

    def test_the_same_picture_is_exit_code_0(self, verify: Any, made: str) -> None:
        ended = verify(made, "--image", str(DOG))

        assert ended.returncode == 0, ended.stderr
        assert f"The pixels are the same. (job {made}, again " in ended.stdout
        assert "differs" not in ended.stdout
        assert ended.stdout.count(" same") == 13

    def test_json_has_every_fact(self, verify: Any, made: str) -> None:
        found = json.loads(verify(made, "--image", str(DOG), "--json").stdout)

        assert (found["job"], found["same_pixels"], found["same_file"], found["causes"]) == (made, True, True, [])
        assert {"name": "model", "job": "fake", "again": "fake", "same": True} in found["facts"]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"pixels_sha256": "0" * 64}, "The pixels differ, and nothing explains it"),
            ({"pixels_sha256": "0" * 64, "device": "abacus"}, "The pixels differ; so do device, which explains it."),
        ],
    )
    def test_another_picture_is_exit_code_1(
        self, verify: Any, made: str, valkey_url: str, changes: dict[str, str], said: str
    ) -> None:
        """As if the job had been made elsewhere: its record tells of other pixels."""
        with redis.Redis.from_url(valkey_url) as server:
            (key,) = (
                key
                for key in server.scan_iter("*job:*")
                if key.endswith(made.encode()) and server.hexists(key, "outcome")
            )
            outcome = json.loads(server.hget(key, "outcome"))
            outcome["result"]["receipt"] |= changes
            server.hset(key, "outcome", json.dumps(outcome))

        ended = verify(made, "--image", str(DOG))

        assert ended.returncode == 1, ended.stderr
        assert said in ended.stdout

    def test_what_cannot_be_told_is_exit_code_2(
        self, verify: Any, made: str, http: httpx.Client, tmp_path: Path
    ) -> None:
        """One line says why: no promise, no input, another input, no such job, no service."""
        other = tmp_path / "other.png"
        other.write_bytes(DOG.read_bytes() + b"\0")
        plain = finished(http)["id"]
        cases = [
            (verify(plain), "was not made with 'reproducible'"),
            (verify(made), f"Job {made} had 'image' (PNG of 256x256, {DOG.stat().st_size} bytes, SHA-256 "),
            (verify(made, "--image", str(other)), f"is another file than job {made} had"),
            (verify(made, "--image", str(DOG), "--mask", str(DOG)), "had no 'mask': leave it out"),
            (verify("0-1"), "[job_not_found]"),
            (run("verify", made, "--server", "127.0.0.1:1"), "No service answers"),
        ]

        for ended, message in cases:
            assert ended.returncode == 2, ended.stderr
            assert message in ended.stderr
            assert ended.stderr.startswith("Error: ")
            assert "Traceback" not in ended.stderr

    def test_jobs_get_shows_the_receipt(self, made: str, gateway: Gateway) -> None:
        shown = run("jobs", "get", made, IMG2IMG_SERVER=gateway.grpc).stdout

        assert "receipt      pixels " in shown
        assert "fake fake-1, 10 steps of dpmpp_2m, none on cpu, reproducible, 1 rows" in shown
