"""Certificates for tests, by openssl, and the folder in which Kubernetes shows them to a pod."""

import shutil
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import FOR_LOOPBACK, NEW_CERTIFICATE


class Authority:
    """Makes certificates that it has signed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.path = folder, folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        self._run("-subj", f"/CN={name}", "-days", "1", "-keyout", self._key, "-out", self.path)

    def certificate(self, name: str) -> tuple[Path, Path]:
        """A certificate for loopback and its key."""
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        self._run(*FOR_LOOPBACK, "-CA", self.path, "-CAkey", self._key, "-keyout", key, "-out", cert)
        return cert, key

    def secret(self, name: str) -> dict[str, str]:
        """A new certificate as cert-manager stores it: with its key, and with this authority."""
        cert, key = self.certificate(name)
        return {"tls.crt": cert.read_text(), "tls.key": key.read_text(), "ca.crt": self.path.read_text()}

    @staticmethod
    def _run(*arguments: str | Path) -> None:
        subprocess.run([*NEW_CERTIFICATE, *map(str, arguments)], check=True, capture_output=True)


class SecretVolume:
    """A secret that is mounted: each file is a link through one link, which the kubelet switches."""

    def __init__(self, path: Path, files: Mapping[str, str]) -> None:
        self.path, self._version = path, 0
        path.mkdir()
        for name in files:
            (path / name).symlink_to(f"..data/{name}")
        self.write(files)

    def write(self, files: Mapping[str, str]) -> None:
        self._version += 1
        old, new = self.path / f"..{self._version - 1}", self.path / f"..{self._version}"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text)
        (self.path / "..data_tmp").symlink_to(new.name)
        (self.path / "..data_tmp").replace(self.path / "..data")
        shutil.rmtree(old, ignore_errors=True)


def shown_by(address: str) -> str:
    """The certificate (PEM) that a new connection sees."""
    host, _, port = address.removeprefix("https://").rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=30)
