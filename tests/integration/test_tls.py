"""Server TLS by setting, on every port, keys over it, and certificates that are renewed."""

import hashlib
import ssl
from pathlib import Path

import grpc
import httpx
import pytest

from img2img.client import Client, ClientError
from tests.certificates import Authority, SecretVolume, shown_by
from tests.keda import Keda
from tests.stack import MODEL_PATH, Gateway, Stack, eventually
from tests.up import running

KEYS = {"acme": "key-of-acme", "umbrella": "key-of-umbrella"}


def tenants_file(folder: Path) -> str:
    path = folder / "tenants.toml"
    path.write_text(
        "".join(
            f'[[tenants]]\naccount = "{account}"\nkey_sha256 = ["{hashlib.sha256(key.encode()).hexdigest()}"]\n'
            for account, key in KEYS.items()
        )
    )
    return str(path)


def test_keys_and_tls_on_every_front_end(stack: Stack, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """One tenants file lets an account in everywhere and keeps the others' jobs out of sight, over TLS."""
    cert, key = certificate
    stack.worker()
    gateway = stack.gateway(host="0.0.0.0", tenants_file=tenants_file(tmp_path), tls_cert=str(cert), tls_key=str(key))
    address = gateway.http.replace("http://", "https://")
    trust = ssl.create_default_context(cafile=str(cert))
    with httpx.Client(base_url=address, verify=trust, trust_env=False, timeout=60) as http:
        assert http.get("/v1/jobs").status_code == 401
        mine = {"authorization": f"Bearer {KEYS['acme']}"}
        job_id = http.post("/v1/jobs", json={"prompt": "a dog"}, headers=mine).json()["id"]
        page = mine | {"origin": "https://acme.example", "host": "pictures.example"}
        assert http.get(f"/v1/jobs/{job_id}", headers=page).status_code == 200  # it has a key
        run = MODEL_PATH.format(account="acme")
        assert http.post(run, json={"prompt": "a dog"}, headers=mine).headers["content-type"] == "image/png"
        assert http.post(run, json={"prompt": "a dog"}).status_code == 403
        other = {"authorization": f"Bearer {KEYS['umbrella']}"}
        assert http.post(run, json={"prompt": "a dog"}, headers=other).status_code == 401
        for path in ("", "/events", "/image"):
            assert http.get(f"/v1/jobs/{job_id}{path}", headers=other).status_code == 404
        assert http.post(f"/v1/jobs/{job_id}/cancel", headers=other).status_code == 404
    with Client(gateway.grpc, key=KEYS["acme"], tls=True, ca=cert) as grpc:
        assert grpc.get(job_id).id == job_id
    with Client(gateway.grpc, key=KEYS["umbrella"], tls=True, ca=cert) as grpc:
        with pytest.raises(ClientError) as caught:
            grpc.get(job_id)
        assert caught.value.code == "job_not_found"
    with Client(gateway.grpc, tls=True, ca=cert) as grpc, pytest.raises(ClientError) as caught:
        grpc.list()
    assert caught.value.code == "missing_credentials"
    command = running.run("jobs", "list", "--server", gateway.grpc, "--ca", str(cert))
    assert command.returncode == 1
    assert "this command sends what --key or IMG2IMG_KEY has [missing_credentials]" in command.stderr


def gateway_with(stack: Stack, mounted: Path) -> Gateway:
    """TLS on all three ports, by the files of one secret."""
    cert, key, authority = (str(mounted / name) for name in ("tls.crt", "tls.key", "ca.crt"))
    ports = {"tls_cert": cert, "tls_key": key, "scaler_tls_cert": cert, "scaler_tls_key": key}
    gateway = stack.gateway(**ports, scaler_port="0", scaler_client_ca=authority)
    gateway.http = gateway.http.replace("http://", "https://")
    return gateway


def over_http(gateway: Gateway, authority: Authority) -> httpx.Client:
    """Which trusts this authority only."""
    trust = ssl.create_default_context(cafile=str(authority.path))
    return httpx.Client(base_url=gateway.http, verify=trust, trust_env=False, timeout=60)


def keda(gateway: Gateway, authority: Authority) -> Keda:
    """With a certificate of this authority, the only one that it trusts."""
    assert gateway.scaler is not None
    cert, key = (path.read_bytes() for path in authority.certificate("keda"))
    return Keda(gateway.scaler, grpc.ssl_channel_credentials(authority.path.read_bytes(), key, cert), pool="default")


def ports_show(gateway: Gateway, secret: dict[str, str]) -> bool:
    """Whether new connections to every port see this certificate."""
    assert gateway.scaler is not None
    return all(shown_by(port) == secret["tls.crt"] for port in (gateway.http, gateway.grpc, gateway.scaler))


def times_told(gateway: Gateway, event: str) -> int:
    return [entry.get("event") for entry in gateway.entries()].count(event)


def test_new_connections_see_a_renewed_certificate(stack: Stack, tmp_path: Path) -> None:
    """On every port, and KEDA's takes the clients of its new authority; connections that are open go on."""
    before, after = Authority(tmp_path, "before"), Authority(tmp_path, "after")
    old, new = before.secret("old"), after.secret("new")
    volume = SecretVolume(tmp_path / "tls", old)
    gateway = gateway_with(stack, volume.path)
    assert ports_show(gateway, old)
    with (
        over_http(gateway, before) as http,
        Client(gateway.grpc, ca=before.path) as client,
        keda(gateway, before) as scaler,
    ):
        job_id = http.post("/v1/jobs", json={"prompt": "a dog"}).json()["id"]
        with http.stream("GET", f"/v1/jobs/{job_id}/events") as streamed:
            lines, watching, pushed = streamed.iter_lines(), client.watch(job_id), scaler.pushed()
            assert (next(lines), next(watching).type, next(pushed)) == ("id: 1", "queued", True)
            volume.write(new)
            eventually(lambda: ports_show(gateway, new), "every port shows the new certificate")
            with over_http(gateway, after) as renewed:
                assert renewed.get("/v1/jobs").status_code == 200
            with keda(gateway, after) as asking:
                assert asking.is_active()
            with keda(gateway, before) as stranger, pytest.raises(grpc.RpcError):
                stranger.is_active()
            client.cancel(job_id)
            assert "event: canceled" in list(lines)
            assert [event.type for event in watching][-1] == "canceled"
            assert next(pushed) is False


def test_files_of_no_use_change_nothing(stack: Stack, tmp_path: Path) -> None:
    """A certificate that came without its key is seen and not taken by any port; the next good pair is."""
    authority = Authority(tmp_path, "authority")
    old, new = authority.secret("old"), authority.secret("new")
    volume = SecretVolume(tmp_path / "tls", old)
    gateway = gateway_with(stack, volume.path)
    volume.write({**old, "tls.crt": new["tls.crt"]})
    eventually(lambda: times_told(gateway, "certificate_files_ignored") == 2, "both pairs of settings were looked at")
    assert ports_show(gateway, old)
    volume.write(new)
    eventually(lambda: ports_show(gateway, new), "every port shows the new certificate")
