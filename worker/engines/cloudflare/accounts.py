"""Who pays for the calls: accounts of Cloudflare and their tokens, which never get into a log, a repr or an error."""

import hashlib
import re
from pathlib import Path
from typing import Final

import msgspec

from img2img.errors import ConfigurationError
from img2img.toml_files import read_toml
from img2img.upstream import Credential

ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
TOKEN: Final = re.compile(r"[!-~]{1,512}")
REMEDY: Final = "write [[accounts]] entries with id and token, or token_file"
LABEL_DIGITS: Final = 12


class Account:
    """An account and one of its tokens; ``label`` stands for the account where callers see it."""

    def __init__(self, account_id: str, token: str) -> None:
        self.id = account_id
        self.authorization = f"Bearer {token}"
        self.credential = Credential(account_id, _digest(token))
        self.label = _digest(account_id)[:LABEL_DIGITS]

    def __repr__(self) -> str:
        return f"Account({self.id!r})"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An account in the file; a relative ``token_file`` lies beside it."""

    id: str
    token: str | None = None
    token_file: str | None = None

    def __repr__(self) -> str:
        return f"Entry({self.id!r})"


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    accounts: tuple[Entry, ...]


def load_accounts(account: str | None, token: str | None, path: Path | None) -> tuple[Account, ...]:
    """The accounts of the file at ``path``, or the one of ``account`` and ``token``.

    Raises:
        ConfigurationError: neither or both are given, or one is wrong; names it and the remedy, but no token.
    """
    if path is not None and (account or token):
        raise ConfigurationError(
            "IMG2IMG_UPSTREAM_ACCOUNTS_FILE takes the place of IMG2IMG_UPSTREAM_ACCOUNT and IMG2IMG_UPSTREAM_TOKEN: "
            "unset it, or those two"
        )
    if path is not None:
        return _read(path)
    if not account or not token:
        raise ConfigurationError(
            "The cloudflare engine needs an account: set IMG2IMG_UPSTREAM_ACCOUNT and IMG2IMG_UPSTREAM_TOKEN, or "
            "IMG2IMG_UPSTREAM_ACCOUNTS_FILE"
        )
    return (_checked(account, token, "IMG2IMG_UPSTREAM_ACCOUNT", "IMG2IMG_UPSTREAM_TOKEN"),)


def _read(path: Path) -> tuple[Account, ...]:
    content = read_toml(path, File, "IMG2IMG_UPSTREAM_ACCOUNTS_FILE", REMEDY)
    accounts = tuple(_account(path, number, entry) for number, entry in enumerate(content.accounts, 1))
    if not accounts:
        raise ConfigurationError(f"{path} has no accounts: {REMEDY}")
    if len({account.credential for account in accounts}) < len(accounts):
        raise ConfigurationError(f"{path} has the same account and token twice: remove one of the two")
    return accounts


def _account(path: Path, number: int, entry: Entry) -> Account:
    where = f"{path}: account {number}"
    if (entry.token is None) == (entry.token_file is None):
        raise ConfigurationError(f"{where} needs token or token_file: give one of the two")
    if entry.token_file is None:
        return _checked(entry.id, entry.token or "", f"{where}: id", f"{where}: token")
    file = path.parent / entry.token_file
    try:
        token = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{where}: its token_file {file} cannot be read: check the path") from exc
    return _checked(entry.id, token, f"{where}: id", f"{where}: token_file")


def _checked(account_id: str, token: str, id_name: str, token_name: str) -> Account:
    if not ID.fullmatch(account_id):
        raise ConfigurationError(f"{id_name} must be 1 to 64 letters, digits, '-' and '_': copy it from the dashboard")
    token = token.strip()
    if not TOKEN.fullmatch(token):
        raise ConfigurationError(f"{token_name} must be 1 to 512 visible ASCII characters: copy the token again")
    return Account(account_id, token)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
