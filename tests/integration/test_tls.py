"""Server TLS by setting, on both ports, and keys over it."""

import hashlib
import ssl
from pathlib import Path

import httpx
import pytest

from img2img.client import Client, ClientError
from tests.stack import MODEL_PATH, Stack
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
