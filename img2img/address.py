"""What ``IMG2IMG_REDIS_URL`` says: where the queue server is, or which sentinels know.

No message repeats any part of a URL: it may hold a password, or be one that was not escaped.
"""

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn, Self
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from redis.asyncio.connection import Connection, SSLConnection, parse_url
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError, RedisError

from img2img.errors import ConfigurationError

SENTINEL_PORT: Final = 26379
SENTINEL_TIMEOUT: Final = 1.0
"""How long a sentinel may take to answer (seconds)."""
SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
TLS_OPTIONS: Final = frozenset(
    {"ssl_ca_certs", "ssl_ca_data", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers"}
)
LOGIN_OPTIONS: Final = frozenset({"db", "username", "password", "client_name"})
SENTINEL_OPTIONS: Final = frozenset({"sentinel_username", "sentinel_password"})
# Seconds: a connection that says nothing is tried after 15, and given up after 15 more; firewalls, too, forget later.
KEEPALIVE: Final = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}


class Sentinels:
    """Knows the master's address from whichever sentinel answers; close it in the end."""

    def __init__(self, addresses: list[tuple[str, int]], master: str, options: Mapping[str, Any]) -> None:
        timeouts = {"socket_timeout": SENTINEL_TIMEOUT, "socket_connect_timeout": SENTINEL_TIMEOUT}
        every = {**options, **timeouts}
        self._sentinels = [Sentinel([address], sentinel_kwargs=every) for address in addresses]  # type: ignore[no-untyped-call]
        self._master = master

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for sentinel in self._sentinels:
            for client in sentinel.sentinels:
                await client.aclose()

    async def find_master(self) -> tuple[str, int]:
        """The master's host and port, from the first sentinel that answers.

        Raises:
            redis.exceptions.ConnectionError: no sentinel answers, or none knows a master that is up.
        """
        # All at once: one after another, silent ones first, would take longer than a worker's heart has time for.
        asked = [asyncio.create_task(sentinel.discover_master(self._master)) for sentinel in self._sentinels]
        try:
            for answer in asyncio.as_completed(asked):
                with suppress(RedisError, OSError):
                    found: tuple[str, int] = await answer
                    return found
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise ConnectionError(f"No sentinel knows a master {self._master!r} that is up")


class MasterConnection(Connection):
    """Asks the sentinels for the master whenever it connects."""

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels

    async def _connect(self) -> None:
        self.host, self.port = await self._sentinels.find_master()
        await super()._connect()  # type: ignore[no-untyped-call]


class MasterSSLConnection(MasterConnection, SSLConnection):
    """The same over TLS."""


def connection_options(url: str) -> dict[str, Any]:
    """The arguments for redis-py's pool that ``url`` stands for; with sentinels, they are its ``sentinels``.

    Raises:
        ConfigurationError: says what is wrong, and what a URL looks like.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        _refuse("it cannot be read")
    if parts.scheme not in SCHEMES:
        _refuse(f"it must begin with {', '.join(f'{scheme}://' for scheme in SCHEMES[:-1])} or {SCHEMES[-1]}://")
    if parts.fragment:
        _refuse("there is a # in it")
    _check_query(parts.scheme, query)
    if parts.scheme == "unix":
        return _parsed(url)
    keepalive = {"socket_keepalive": True, "socket_keepalive_options": KEEPALIVE}
    if parts.scheme.endswith("+sentinel"):
        return _sentinel_options(parts, query) | keepalive
    _addresses(parts, default_port=6379)
    _check_database(parts.path.removeprefix("/"))
    return _parsed(url) | keepalive


def _sentinel_options(parts: SplitResult, query: dict[str, str]) -> dict[str, Any]:
    master, _, database = parts.path.removeprefix("/").partition("/")
    if not master:
        _refuse("the master's name, as the sentinels call it, must follow the hosts")
    _check_database(database)
    own = {name.removeprefix("sentinel_"): query.pop(name) for name in SENTINEL_OPTIONS & query.keys()}
    scheme = parts.scheme.removesuffix("+sentinel")
    user, at, _ = parts.netloc.rpartition("@")
    options = _parsed(f"{scheme}://{user}{at}master/{database}?{urlencode(query)}")
    del options["host"]
    tls = scheme == "rediss"
    own |= {name: value for name, value in options.items() if name in TLS_OPTIONS} | {"ssl": tls}
    options["connection_class"] = MasterSSLConnection if tls else MasterConnection
    options["sentinels"] = Sentinels(_addresses(parts, SENTINEL_PORT), master, own)
    return options


def _addresses(parts: SplitResult, default_port: int) -> list[tuple[str, int]]:
    """Host and port of every server that the URL names."""
    found = []
    for address in parts.netloc.rpartition("@")[2].split(","):
        try:
            server = urlsplit(f"//{address}")
            host, port = server.hostname, server.port or default_port
        except ValueError:
            _refuse("a port is no number")
        if not host:
            _refuse("it names no host")
        found.append((host, port))
    if len(found) > 1 and not parts.scheme.endswith("+sentinel"):
        _refuse("only sentinels can be several")
    return found


def _check_database(text: str) -> None:
    if text and not text.isdecimal():
        _refuse("the database must be a number")


def _check_query(scheme: str, query: dict[str, str]) -> None:
    known = LOGIN_OPTIONS
    if scheme.startswith("rediss"):
        known |= TLS_OPTIONS
    if scheme.endswith("+sentinel"):
        known |= SENTINEL_OPTIONS
    if not query.keys() <= known:
        _refuse(f"after the ? it takes only {', '.join(sorted(known))}")


def _parsed(url: str) -> dict[str, Any]:
    try:
        options = dict(parse_url(url))
    except ValueError:
        _refuse("it cannot be read")
    tls: dict[str, Any] = {name: value for name, value in options.items() if name in TLS_OPTIONS}
    if tls:
        try:
            SSLConnection(**tls).ssl_context.get()
        except (OSError, RedisError) as exc:
            _refuse(f"its ssl_ options cannot be used ({exc})")
    return options


def _refuse(reason: str) -> NoReturn:
    raise ConfigurationError(
        f"IMG2IMG_REDIS_URL: {reason}: use redis://[user:password@]host:6379/0, unix:///path/to/socket, or "
        "redis+sentinel://[user:password@]host:26379,host:26379/master-name/0; rediss instead of redis for TLS; "
        "special characters in a password as %XX"
    ) from None
