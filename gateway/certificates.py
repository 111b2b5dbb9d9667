"""The certificates of the gateway's ports: taken from their files at the start, and again when the files change.

Whoever renews a certificate, such as cert-manager, writes the files of a running gateway anew. Connections that are
open go on with the certificate that they began with.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import grpc
import msgspec
import structlog

from img2img.errors import ConfigurationError
from img2img.settings import PREFIX, Settings

CHECK_SECONDS: Final = 5.0
"""Between two looks at the files."""

log = structlog.get_logger(__name__)


class Loaded(msgspec.Struct, frozen=True):
    """Files that go together: what they held, and what HTTP and gRPC make of it."""

    contents: tuple[bytes, ...]
    context: ssl.SSLContext
    configuration: grpc.ServerCertificateConfiguration


class Certificates:
    """The newest files that were of use, for any number of servers."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """``paths``, by the names of their settings: a certificate chain, its key and, where clients need a
        certificate, too, the authority of theirs.

        Raises:
            ConfigurationError: a file is of no use; names its setting.
        """
        self._paths = paths
        self._newest = _load(paths)
        self._problem: str | None = None

    def context(self) -> ssl.SSLContext:
        """For an HTTP server: each handshake takes the newest."""

        def take_newest(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            connection.context = self._newest.context

        context = self._newest.context
        context.sni_callback = take_newest
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """For one gRPC server: each handshake takes the newest, and an authority lets only its own clients in."""
        given = self._newest

        def take_newest() -> grpc.ServerCertificateConfiguration | None:  # in one of gRPC's threads
            nonlocal given
            newest = self._newest
            if newest is given:
                return None
            given = newest
            return newest.configuration

        return grpc.dynamic_ssl_server_credentials(
            given.configuration,
            take_newest,  # type: ignore[arg-type]  # None is for no change
            require_client_authentication=len(given.contents) > 2,
        )

    def look(self) -> None:
        """Take files that have changed. What is of no use changes nothing, is told once, and is tried again."""
        try:
            loaded = self._newest if _read(self._paths) == self._newest.contents else _load(self._paths)
        except ConfigurationError as exc:
            if str(exc) != self._problem:
                log.warning("certificate_files_ignored", error=str(exc))
            self._problem = str(exc)
            return
        self._problem = None
        if loaded is not self._newest:
            self._newest = loaded
            log.info("certificate_files_read", files=[str(path) for path in self._paths.values()])

    async def watch(self) -> None:
        """Look every CHECK_SECONDS, for ever, in a thread; one that fails as nobody foresaw is not the last."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                await asyncio.to_thread(self.look)
            except Exception:
                log.exception("certificate_look_failed")


@asynccontextmanager
async def open_certificates(settings: Settings, *names: str) -> AsyncIterator[Certificates | None]:
    """The certificates in the files of these settings, watched until the block is left; None where they are not set.

    Raises:
        ConfigurationError: a file is of no use; names its setting.
    """
    paths = {name: path for name in names if (path := getattr(settings, name)) is not None}
    if not paths:
        yield None
        return
    certificates = Certificates(paths)
    watching = asyncio.create_task(certificates.watch(), name=f"watch {names[0]}")
    try:
        yield certificates
    finally:
        watching.cancel()


def _load(paths: Mapping[str, Path]) -> Loaded:
    while True:
        contents = _read(paths)
        context = _checked(paths, contents)
        # OpenSSL takes a key from a file only: it has checked what we have if nothing changed meanwhile.
        if _read(paths) == contents:
            certificate, private, *authorities = contents
            configuration = grpc.ssl_server_certificate_configuration([(private, certificate)], *authorities)
            return Loaded(contents, context, configuration)


def _checked(paths: Mapping[str, Path], contents: tuple[bytes, ...]) -> ssl.SSLContext:
    cert, key, *authorities = paths
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # gRPC itself would only say that it cannot bind. Without the password it would ask on the terminal.
        context.load_cert_chain(paths[cert], paths[key], password="")
    except OSError as exc:
        raise ConfigurationError(
            f"{_variable(cert)} and {_variable(key)} must be a PEM certificate and its own, unencrypted key: "
            f"{exc.reason or 'one of them is no PEM' if isinstance(exc, ssl.SSLError) else exc.strerror}"
        ) from exc
    for name, authority in zip(authorities, contents[2:], strict=True):
        try:
            # Around certificates there may be notes in any alphabet, which OpenSSL skips and Python would not pass on.
            context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
        except (ssl.SSLError, ValueError) as exc:
            raise ConfigurationError(f"{_variable(name)} must be the PEM certificate of an authority") from exc
    return context


def _variable(setting: str) -> str:
    return f"{PREFIX}{setting.upper()}"


def _read(paths: Mapping[str, Path]) -> tuple[bytes, ...]:
    contents = []
    for name, path in paths.items():
        try:
            contents.append(path.read_bytes())
        except OSError as exc:
            raise ConfigurationError(f"{_variable(name)}: {path} cannot be read: {exc.strerror}") from exc
    return tuple(contents)
