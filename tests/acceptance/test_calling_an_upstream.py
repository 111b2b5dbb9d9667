"""Workers that have an upstream make the pictures: real processes against the stand-in of Cloudflare's API."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calls import key_of, opened, run_path, write_tenants
from tests.conftest import running_valkey
from tests.stack import DOG, Stack, ended, eventually, state_of, submit
from tests.upstream.running import UpstreamProcess, proxy_settings
from tests.valkey import free_port

FAST_LEASE = {"lease": "1.5", "beat": "0.4"}


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[UpstreamProcess]:
    process = UpstreamProcess(tmp_path / "upstream.log")
    yield process
    process.close()


def test_a_picture_from_upstream(stack: Stack, upstream: UpstreamProcess) -> None:
    """Input, fields and result go through unchanged; the job tells which call made it, and what that cost."""
    stack.worker(**upstream.settings())
    with stack.gateway().client() as client:
        job_id = client.post(
            "/v1/jobs",
            data={"prompt": "a lion", "strength": "0.5", "seed": "7", "width": "320", "height": "256"},
            files={"image": DOG.read_bytes()},
        ).json()["id"]
        job = ended(client, job_id)
        (call,) = upstream.calls()
        fields = {"prompt": "a lion", "strength": 0.5, "seed": 7, "width": 320, "height": 256}
        assert call["fields"] == {**fields, "num_steps": 20, "guidance": 7.5}
        assert (call["image"], call["mask"]) == ("image_b64", False)
        assert job["result"]["upstream"]["request_id"] == call["request_id"]
        assert job["result"]["upstream"]["neurons"] == 12.5
        assert opened(client.get(f"/v1/jobs/{job_id}/image").content).size == (320, 256)
        assert "secret" not in "".join(path.read_text() for path in upstream.log.parent.glob("*.log"))


def test_a_service_in_front_of_another(stack: Stack, tmp_path: Path) -> None:
    """The upstream is this service, too: same dialect, with keys. A wrong key is told in its words."""
    with running_valkey(tmp_path / "behind") as behind_url, Stack(behind_url, tmp_path / "behind") as behind:
        behind.worker()
        back = behind.gateway(tenants_file=write_tenants(tmp_path / "tenants.toml", "acme"))
        ours = proxy_settings(f"{back.http}/client/v4", upstream_token=key_of("acme"))
        front = stack.gateway()
        with front.client() as client, back.client(headers={"authorization": f"Bearer {key_of('acme')}"}) as inner:
            worker = stack.worker(**ours)
            answer = client.post(run_path(), json={"prompt": "a lion", "seed": 3})
            assert answer.headers["content-type"] == "image/png"
            (made,) = inner.get("/v1/jobs").json()["jobs"]
            assert (made["parameters"]["prompt"], made["seed"], made["state"]) == ("a lion", 3, "succeeded")
            same = inner.get(f"/v1/jobs/{made['id']}/image").content
            assert opened(answer.content).tobytes() == opened(same).tobytes()
            worker.close()
            stack.worker(**{**ours, "upstream_token": "wrong"})
            refused = ended(client, submit(client, prompt="a lion")["id"])
            assert (refused["state"], refused["error"]["code"]) == ("failed", "upstream_refused")
            assert "Authentication error" in refused["error"]["message"]


def test_a_cancel_reaches_the_service_behind(stack: Stack, tmp_path: Path) -> None:
    """Canceling a job in front hangs up on the service behind, which cancels its own after the grace period."""
    with running_valkey(tmp_path / "behind") as behind_url, Stack(behind_url, tmp_path / "behind") as behind:
        behind.worker()
        back = behind.gateway(retry_grace="0.2")
        stack.worker(**proxy_settings(f"{back.http}/client/v4", upstream_account="local"))
        with stack.gateway().client() as client, back.client() as inner:
            job_id = submit(client, prompt="a lion fake:step=60")["id"]
            (made,) = eventually(lambda: inner.get("/v1/jobs").json()["jobs"], "the service behind has a job")
            client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
            assert ended(client, job_id)["state"] == "canceled"
            assert ended(inner, made["id"])["state"] == "canceled"


def test_a_cancel_closes_the_call(stack: Stack, upstream: UpstreamProcess) -> None:
    """Only that of its job."""
    stack.worker(**upstream.settings())
    with stack.gateway().client() as client:
        job_id = submit(client, prompt="a lion upstream:hold")["id"]
        other = submit(client, prompt="a dog upstream:hold")["id"]
        upstream.wait_for(2, ended="waiting")
        client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
        (gone,) = upstream.wait_for(1, ended="gone")
        assert gone["fields"]["prompt"] == "a lion upstream:hold"
        assert ended(client, job_id)["state"] == "canceled"
        upstream.set("release")
        assert ended(client, other)["state"] == "succeeded"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_answer_is_asked_for_again(stack: Stack, upstream: UpstreamProcess, how: signal.Signals) -> None:
    """Under the policy `retry` another worker calls again, and the history tells that the first call may be billed."""
    dying = stack.worker(**upstream.settings(**FAST_LEASE, drain_timeout="0"))
    with stack.gateway().client() as client:
        job_id = submit(client, prompt="a lion upstream:hold=1")["id"]
        upstream.wait_for(1, ended="waiting")
        dying.signal(how)
        stack.worker(**upstream.settings(**FAST_LEASE))
        job = ended(client, job_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 2)
        assert [call["ended"] for call in upstream.calls()] == ["gone", "answered"]
        assert "may have been billed" in job["history"][0]["error"]["message"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_answer_ends_the_job(stack: Stack, upstream: UpstreamProcess, how: signal.Signals) -> None:
    """Under the policy `fail` nobody calls again, until the job is replayed."""
    careful = upstream.settings(**FAST_LEASE, drain_timeout="0", upstream_on_lost="fail")
    dying = stack.worker(**careful)
    with stack.gateway().client() as client:
        job_id = submit(client, prompt="a lion upstream:hold=1")["id"]
        upstream.wait_for(1, ended="waiting")
        dying.signal(how)
        stack.worker(**careful)
        job = ended(client, job_id)
        assert (job["state"], job["error"]["code"]) == ("failed", "upstream_unknown")
        assert len(upstream.calls()) == 1
        client.post(f"/v1/jobs/{job_id}/replay").raise_for_status()
        assert ended(client, job_id)["state"] == "succeeded"
        assert len(upstream.calls()) == 2


def test_an_upstream_that_comes_back(stack: Stack, tmp_path: Path) -> None:
    """Down at first, then killed in the middle of calls and started again: every job gets its picture."""
    port = free_port()
    stack.worker(**proxy_settings(f"http://127.0.0.1:{port}/client/v4", retry_delay="0.2"))
    with stack.gateway().client() as client:
        jobs = [submit(client, prompt="a lion", seed=seed)["id"] for seed in range(8)]
        eventually(lambda: any(state_of(client, job_id) == "running" for job_id in jobs), "a job is running")
        upstream = UpstreamProcess(tmp_path / "first.log", "--delay", "0.5", port=port)
        upstream.wait_for(2, ended="waiting")
        upstream.kill()
        upstream = UpstreamProcess(tmp_path / "second.log", port=port)
        try:
            assert [ended(client, job_id)["state"] for job_id in jobs] == ["succeeded"] * len(jobs)
        finally:
            upstream.close()


@pytest.mark.timeout(600)
def test_a_fleet_keeps_within_the_upstreams_limits(stack: Stack, upstream: UpstreamProcess, tmp_path: Path) -> None:
    """Twenty worker processes at three times the load: in the upstream's own count, as many calls as it takes.

    One account is bounded by its own limit, with two tokens below theirs; the other by its token's. What is left over
    cannot be done before its deadline, and is told so, or is not taken by a worker any more.
    """
    file = tmp_path / "accounts.toml"
    pairs = [("wide", "one"), ("wide", "two"), ("narrow", "three")]
    file.write_text("".join(f'[[accounts]]\nid = "{account}"\ntoken = "{token}"\n' for account, token in pairs))
    upstream.set("limits", model=40, model_seconds=60.0, token=30, token_seconds=300.0)
    limits = {"upstream_account_calls": "40", "upstream_token_calls": "30"}
    stack.workers(20, engine="cloudflare", upstream_url=upstream.url, upstream_accounts_file=str(file), **limits)
    with stack.gateway(max_job_age="25", refuse_late="false").client() as client:
        jobs = [submit(client, prompt="a lion", seed=seed, width=256, height=256)["id"] for seed in range(210)]
        outcomes = Counter((job.get("error") or {}).get("code") for job in (ended(client, job_id) for job_id in jobs))
    assert (outcomes[None], outcomes["upstream_busy"] + outcomes["expired"]) == (70, 140)
    seen = upstream.limits()
    assert {account: count["calls"] for account, count in seen["accounts"].items()} == {"wide": 40, "narrow": 30}
    assert all(count["refused"] == 0 for kind in ("accounts", "tokens") for count in seen[kind].values())
    assert all(count["peak"] <= count["limit"] for kind in ("accounts", "tokens") for count in seen[kind].values())
