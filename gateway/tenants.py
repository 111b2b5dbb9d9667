"""Who may use the service: one TOML file of accounts and the hashes of their keys.

    [[tenants]]
    account = "acme"
    key_sha256 = ["<64 hexadecimal digits>"]
    weight = 2.0           # optional: its share of the workers' time, 1 by default
    max_queued = 500       # optional: how many of its jobs may wait, IMG2IMG_MAX_QUEUED_PER_TENANT by default
    residency = "local"    # optional: its jobs go to no pool that makes pictures outside, "any" by default
    spend_per_day = 2.5    # optional: what its jobs may cost on a day (UTC) in each pool, the pool's own cap by default

    [[operators]]          # optional: who runs the service, an autoscaler for instance; has no jobs
    name = "keda"
    key_sha256 = ["<64 hexadecimal digits>"]

Keys are looked up by their SHA-256. A look-up needs no constant-time comparison: what its timing could
reveal is the beginning of a stored hash, and nobody can make a key whose hash begins as he likes without
trying about as many keys as there are hashes with that beginning, and then still has not found a key.
"""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
import structlog

from img2img.errors import (
    AccountMismatch,
    ConfigurationError,
    MissingCredentials,
    NotFound,
    Unauthenticated,
)
from img2img.pools import Amount
from img2img.queue_types import Share
from img2img.toml_files import read_toml

LOCAL_ACCOUNT: Final = "local"
MIN_WEIGHT: Final = 0.001
MAX_WEIGHT: Final = 1000.0
CHECK_INTERVAL: Final = 1.0  # seconds between looks at the file
ANYWHERE: Final = "any"
LOCAL: Final = "local"
UNKNOWN_KEY: Final = "The access key is not known: check it, or ask for a new one"
REMEDY: Final = "make an entry with `img2img keys new ACCOUNT`"

ONE_OF_THEM: Final = "remove it from one of them"

_ACCOUNT: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH: Final = re.compile(r"[0-9a-fA-F]{64}")
_BEARER: Final = re.compile(r"bearer +(\S+) *", re.IGNORECASE)

log = structlog.get_logger(__name__)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One account of the file; several keys let one be replaced without an interruption."""

    account: str
    key_sha256: list[str]
    weight: Annotated[float, msgspec.Meta(ge=MIN_WEIGHT, le=MAX_WEIGHT)] = 1.0
    max_queued: Annotated[int, msgspec.Meta(ge=0)] | None = None
    residency: str = ANYWHERE
    spend_per_day: Amount | None = None


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody who runs the service: sees what concerns no account."""

    name: str
    key_sha256: list[str]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenants: list[Entry]
    operators: list[Operator] = []


class Register(msgspec.Struct, frozen=True):
    """What the file says: the account of each key's hash, the entry of each account, the hashes of operators' keys."""

    accounts: Mapping[str, str]
    entries: Mapping[str, Entry]
    operators: Set[str]


class Tenants:
    """The keys of a file, read again when the file changes; or no keys at all, for one machine."""

    def __init__(self, path: Path | None, register: Register, version: tuple[int, ...] | None = None) -> None:
        self._path = path
        self._register = register
        self._version = version
        self._checked_at = time.monotonic()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            ConfigurationError: names the file, the entry and the remedy.
        """
        version = _version(path)  # before reading, so that a change in between is seen later
        return cls(path, _read(path), version)

    @classmethod
    def open_local(cls) -> Self:
        """No keys: everybody is let in, under the account of the URL or as ``local``."""
        return cls(None, Register({}, {}, frozenset()))

    @property
    def has_keys(self) -> bool:
        return self._path is not None

    def account_of(self, key: str) -> str | None:
        """The account that ``key`` belongs to, or None."""
        self._refresh()
        return self._register.accounts.get(_digest(key))

    def share_of(self, account: str, max_queued: int) -> Share:
        """What the account is entitled to; ``max_queued`` is for one whose entry says nothing of it."""
        entry = self._register.entries.get(account)
        if entry is None:
            return Share(max_queued=max_queued)
        return Share(
            weight=entry.weight,
            max_queued=max_queued if entry.max_queued is None else entry.max_queued,
            local_only=entry.residency == LOCAL,
            spend_per_day=entry.spend_per_day,
        )

    def authenticate(self, authorization: str | None, account: str | None = None) -> str:
        """The account of a request; ``authorization`` is its header, ``account`` the one in its URL.

        Raises:
            NotFound: the URL's account cannot be one.
            MissingCredentials: a key is needed and there is none.
            Unauthenticated: the key is not known.
            AccountMismatch: the key belongs to another account than the URL names.
        """
        if account is not None and not _ACCOUNT.fullmatch(account):
            raise NotFound("No such account: an id has 1 to 64 letters, digits, '-' and '_'")
        if not self.has_keys:
            return account or LOCAL_ACCOUNT
        owner = self.account_of(_key_in(authorization))
        if owner is None:
            raise Unauthenticated(UNKNOWN_KEY)
        if account is not None and account != owner:
            raise AccountMismatch("The access key belongs to another account than the URL names: use that one's")
        return owner

    def authenticate_operator(self, authorization: str | None) -> None:
        """Let operators pass; without a file everybody is one. ``authorization`` is the request's header.

        Raises:
            MissingCredentials: a key is needed and there is none.
            Unauthenticated: the key is not known.
            AccountMismatch: the key belongs to an account.
        """
        if not self.has_keys:
            return
        key = _key_in(authorization)
        self._refresh()
        if _digest(key) in self._register.operators:
            return
        if self.account_of(key) is not None:
            raise AccountMismatch(
                "The access key belongs to an account, and this is for operators: "
                "make an entry with `img2img keys new --operator NAME`"
            )
        raise Unauthenticated(UNKNOWN_KEY)

    def _refresh(self) -> None:
        """Read a changed file. A broken one changes nothing, so that a slip of the pen locks nobody out."""
        now = time.monotonic()
        if self._path is None or now - self._checked_at < CHECK_INTERVAL:
            return
        self._checked_at = now
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._register = _read(self._path)
        except ConfigurationError as exc:
            log.warning("tenants_file_ignored", error=str(exc), kept=len(self._register.accounts))
        else:
            log.info("tenants_file_read", keys=len(self._register.accounts))


def bearer_from_headers(authorization: str | None, x_auth_key: str | None) -> str | None:
    """The ``Authorization`` header, or one made of ``X-Auth-Key``, which Cloudflare's SDKs can send instead."""
    if authorization is None and x_auth_key is not None:
        return f"Bearer {x_auth_key}"
    return authorization


def _key_in(authorization: str | None) -> str:
    bearer = _BEARER.fullmatch((authorization or "").strip())
    if bearer is None:
        raise MissingCredentials("Send your access key in the header 'Authorization: Bearer <key>'")
    return bearer[1]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _version(path: Path) -> tuple[int, ...] | None:
    """What changes with every way of writing a file, a Kubernetes volume's switched link included."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> Register:
    content = read_toml(path, File, "IMG2IMG_TENANTS_FILE", REMEDY)
    accounts: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    for number, entry in enumerate(content.tenants, 1):
        _add(accounts, entry, f"{path}: tenant {number} ({entry.account!r})")
        # Two entries of an account are one account with more keys; what the first says of its share counts,
        # but what one of them keeps here stays here.
        first = entries.setdefault(entry.account, entry)
        if entry.residency == LOCAL:
            entries[entry.account] = msgspec.structs.replace(first, residency=LOCAL)
    if not accounts:
        raise ConfigurationError(f"{path} has no tenants, so nobody could use the service: {REMEDY}")
    return Register(accounts, entries, _operators(path, content.operators, accounts))


def _operators(path: Path, operators: Sequence[Operator], accounts: Mapping[str, str]) -> Set[str]:
    digests: set[str] = set()
    for number, operator in enumerate(operators, 1):
        where = f"{path}: operator {number} ({operator.name!r})"
        if not _ACCOUNT.fullmatch(operator.name):
            raise ConfigurationError(f"{where}: a name has 1 to 64 letters, digits, '-' and '_': rename it")
        for count, digest in enumerate(_digests(operator.key_sha256, where, "operator"), 1):
            if digest in accounts:
                raise ConfigurationError(f"{where}: key {count} belongs to {accounts[digest]!r} too: {ONE_OF_THEM}")
            digests.add(digest)
    return digests


def _add(accounts: dict[str, str], entry: Entry, where: str) -> None:
    if not _ACCOUNT.fullmatch(entry.account):
        raise ConfigurationError(f"{where}: an account id has 1 to 64 letters, digits, '-' and '_': rename it")
    if entry.residency not in (ANYWHERE, LOCAL):
        raise ConfigurationError(
            f"{where}: residency is {entry.residency!r}: write {ANYWHERE!r}, or {LOCAL!r} to keep its pictures here"
        )
    for number, digest in enumerate(_digests(entry.key_sha256, where, "tenant"), 1):
        owner = accounts.setdefault(digest, entry.account)
        if owner != entry.account:
            raise ConfigurationError(f"{where}: key {number} belongs to {owner!r} too: {ONE_OF_THEM}")


def _digests(hashes: Sequence[str], where: str, kind: str) -> list[str]:
    if not hashes:
        raise ConfigurationError(f"{where}: key_sha256 is empty: {REMEDY}, or remove the {kind}")
    for number, digest in enumerate(hashes, 1):
        if not _HASH.fullmatch(digest):
            raise ConfigurationError(f"{where}: key {number} is no SHA-256 of 64 hexadecimal digits: {REMEDY}")
    return [digest.lower() for digest in hashes]
