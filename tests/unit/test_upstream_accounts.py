"""Who pays for calls upstream: read from settings or a file, and never shown with a token."""

from pathlib import Path

import pytest

from img2img.errors import ConfigurationError
from worker.engines.cloudflare.accounts import Account, load_accounts

TOKEN = "s3cr3t-t0k3n"


def file_of(folder: Path, text: str) -> Path:
    path = folder / "accounts.toml"
    path.write_text(text)
    return path


def test_one_account_from_the_settings() -> None:
    (account,) = load_accounts("acme", f" {TOKEN}\n", None)
    assert (account.id, account.authorization) == ("acme", f"Bearer {TOKEN}")


def test_several_from_a_file_with_tokens_in_it_or_beside_it(tmp_path: Path) -> None:
    (tmp_path / "second.token").write_text("second\n")
    path = file_of(
        tmp_path,
        '[[accounts]]\nid = "one"\ntoken = "first"\n\n[[accounts]]\nid = "two"\ntoken_file = "second.token"\n',
    )
    found = load_accounts(None, None, path)
    assert [(account.id, account.authorization) for account in found] == [
        ("one", "Bearer first"),
        ("two", "Bearer second"),
    ]


def test_a_token_is_in_no_repr_and_stands_behind_a_digest() -> None:
    account = Account("acme", TOKEN)
    assert TOKEN not in f"{account!r} {account} {account.credential} {account.label}"
    assert account.credential != Account("acme", "another").credential
    assert account.label == Account("acme", "another").label
    assert "acme" not in account.label


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Object missing required field `accounts`"),
        ("accounts = []", "has no accounts: write [[accounts]] entries"),
        (f'token = "{TOKEN}', "is not TOML"),
        ('[[accounts]]\nid = "one"', "account 1 needs token or token_file: give one of the two"),
        (f'[[accounts]]\nid = "one"\ntoken = "{TOKEN}"\ntoken_file = "x"', "account 1 needs token or token_file"),
        ('[[accounts]]\nid = "one"\ntoken_file = "missing"', "account 1: its token_file"),
        (f'[[accounts]]\nid = "one"\nkey = "{TOKEN}"', "unknown field `key`"),
        (f'[[accounts]]\nid = "a/b"\ntoken = "{TOKEN}"', "account 1: id must be 1 to 64 letters"),
        (
            f'[[accounts]]\nid = "one"\ntoken = "{TOKEN} ü"',
            "account 1: token must be 1 to 512 visible ASCII characters",
        ),
        ('[[accounts]]\nid = "one"\ntoken = " "', "account 1: token must be"),
        (2 * f'[[accounts]]\nid = "one"\ntoken = "{TOKEN}"\n', "has the same account and token twice"),
    ],
)
def test_a_wrong_file_is_told_without_its_tokens(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_accounts(None, None, file_of(tmp_path, text))
    assert expected in str(caught.value)
    assert "accounts.toml" in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="check IMG2IMG_UPSTREAM_ACCOUNTS_FILE"):
        load_accounts(None, None, tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xe4")
    with pytest.raises(ConfigurationError, match=r"is not TOML: .*: write"):
        load_accounts(None, None, tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("account", "token", "file", "expected"),
    [
        (None, None, False, "needs an account: set IMG2IMG_UPSTREAM_ACCOUNT and IMG2IMG_UPSTREAM_TOKEN"),
        ("acme", None, False, "needs an account"),
        (None, TOKEN, False, "needs an account"),
        ("acme", TOKEN, True, "unset it, or those two"),
        ("a b", TOKEN, False, "IMG2IMG_UPSTREAM_ACCOUNT must be"),
        ("acme", "a b", False, "IMG2IMG_UPSTREAM_TOKEN must be"),
    ],
)
def test_a_wrong_setting_names_its_remedy(
    tmp_path: Path, account: str | None, token: str | None, file: bool, expected: str
) -> None:
    path = file_of(tmp_path, "accounts = []") if file else None
    with pytest.raises(ConfigurationError) as caught:
        load_accounts(account, token, path)
    assert expected in str(caught.value)
    assert TOKEN not in str(caught.value)
