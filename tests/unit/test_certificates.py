"""Certificates that are taken from their files again when these change."""

import asyncio
import ssl
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway import certificates as under_test
from gateway.certificates import Certificates
from img2img.errors import ConfigurationError
from tests.certificates import Authority, SecretVolume

READ, IGNORED = "certificate_files_read", "certificate_files_ignored"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def old(authority: Authority) -> dict[str, str]:
    return authority.secret("old")


@pytest.fixture(scope="module")
def new(authority: Authority) -> dict[str, str]:
    return authority.secret("new")


@pytest.fixture
def volume(tmp_path: Path, old: dict[str, str]) -> SecretVolume:
    return SecretVolume(tmp_path / "tls", old)


@pytest.fixture
def paths(volume: SecretVolume) -> dict[str, Path]:
    """By their settings."""
    settings = ("scaler_tls_cert", "scaler_tls_key", "scaler_client_ca")
    return dict(zip(settings, map(volume.path.joinpath, ("tls.crt", "tls.key", "ca.crt")), strict=True))


@pytest.fixture
def certificates(paths: dict[str, Path]) -> Certificates:
    return Certificates(paths)


def shown(context: ssl.SSLContext, name: str | None) -> str:
    """The certificate (PEM) that a client sees that asks for ``name``, or for none."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server, server_hostname=name)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    client.do_handshake()
    certificate = client.getpeercert(binary_form=True)
    assert certificate is not None
    return ssl.DER_cert_to_PEM_cert(certificate)


def look(certificates: Certificates, times: int = 1) -> list[str]:
    """What the log tells of so many looks."""
    with capture_logs() as logs:
        for _ in range(times):
            certificates.look()
    return [entry["event"] for entry in logs]


@pytest.mark.parametrize("name", [None, "pictures.example.com"])
def test_one_context_shows_what_is_newest(
    certificates: Certificates, volume: SecretVolume, old: dict[str, str], new: dict[str, str], name: str | None
) -> None:
    context = certificates.context()
    assert shown(context, name) == old["tls.crt"]
    volume.write(new)
    assert look(certificates, 3) == [READ]
    assert shown(context, name) == new["tls.crt"]
    volume.write(old)
    assert look(certificates, 3) == [READ]
    assert shown(context, name) == old["tls.crt"]


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
def test_a_file_of_no_use_is_told_once_and_tried_again(
    certificates: Certificates, volume: SecretVolume, old: dict[str, str], new: dict[str, str], name: str
) -> None:
    """Whether it is cut off, empty, or away."""
    context = certificates.context()
    path = volume.path / name
    for written in (new[name][:200], ""):
        volume.write({**new, name: written})
        look(certificates)
        assert look(certificates, 3) == []
        assert shown(context, None) == old["tls.crt"]
    path.unlink()
    assert look(certificates, 3) == [IGNORED]
    assert shown(context, None) == old["tls.crt"]
    path.write_text(new[name])
    assert look(certificates, 3) == [READ]
    assert shown(context, None) == new["tls.crt"]


def test_a_certificate_without_its_key_is_not_taken(
    certificates: Certificates, volume: SecretVolume, old: dict[str, str], new: dict[str, str]
) -> None:
    """Each such spell is told."""
    context = certificates.context()
    for _ in range(2):
        volume.write({**old, "tls.crt": new["tls.crt"]})
        assert look(certificates, 3) == [IGNORED]
        assert shown(context, None) == old["tls.crt"]
        volume.write(old)
        assert look(certificates, 3) == []


def test_an_authority_may_have_notes_in_any_alphabet(
    certificates: Certificates, volume: SecretVolume, new: dict[str, str]
) -> None:
    """Above its certificate, as bundles of several have them."""
    volume.write({**new, "ca.crt": f"# Főtanúsítvány\n{new['ca.crt']}"})
    assert look(certificates, 3) == [READ]


def test_an_authority_that_is_no_pem_is_told(paths: dict[str, Path], new: dict[str, str]) -> None:
    paths["scaler_client_ca"].write_bytes(ssl.PEM_cert_to_DER_cert(new["ca.crt"]))
    with pytest.raises(ConfigurationError, match="IMG2IMG_SCALER_CLIENT_CA must be the PEM certificate"):
        Certificates(paths)


async def test_a_look_that_fails_unforeseen_is_told_and_not_the_last(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or nothing would be renewed any more, and nobody would know."""
    looks = 0
    looked_again = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Surprising(Certificates):
        def look(self) -> None:
            nonlocal looks
            looks += 1
            if looks == 1:
                raise KeyError("surprise")
            loop.call_soon_threadsafe(looked_again.set)

    monkeypatch.setattr(under_test, "CHECK_SECONDS", 0.001)
    with capture_logs() as logs:
        watching = asyncio.create_task(Surprising(paths).watch())
        async with asyncio.timeout(30):
            await looked_again.wait()
        watching.cancel()
    assert [entry["event"] for entry in logs].count("certificate_look_failed") == 1
