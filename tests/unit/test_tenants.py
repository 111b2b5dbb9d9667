"""Who may use the service, and as which account."""

import hashlib
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.tenants import Tenants, bearer_from_headers
from img2img.errors import (
    AccountMismatch,
    ConfigurationError,
    MissingCredentials,
    NotFound,
    Unauthenticated,
)
from img2img.queue_types import Share


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(account: str, *keys: str) -> str:
    return f'[[tenants]]\naccount = "{account}"\nkey_sha256 = {[digest(key) for key in keys]}\n'


def operator(name: str, *keys: str) -> str:
    return f'[[operators]]\nname = "{name}"\nkey_sha256 = {[digest(key) for key in keys]}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(entry("acme", "key-1", "key-2") + entry("other-co_2", "key-3"))
    return path


@pytest.fixture
def tenants(path: Path) -> Tenants:
    return Tenants.load(path)


@pytest.fixture
def watched(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> Tenants:
    """Looks at its file before every use."""
    monkeypatch.setattr("gateway.tenants.CHECK_INTERVAL", 0.0)
    return tenants


def replace(path: Path, content: str) -> None:
    """As editors and Kubernetes do it: a new file takes the old one's name."""
    new = path.with_suffix(".new")
    new.write_text(content)
    new.rename(path)


class TestKeys:
    def test_each_key_belongs_to_its_account(self, tenants: Tenants) -> None:
        assert [tenants.account_of(key) for key in ("key-1", "key-2", "key-3")] == ["acme", "acme", "other-co_2"]

    @pytest.mark.parametrize("key", ["", "key", "key-1 ", "KEY-1", digest("key-1"), "\udcff", "ключ"])
    def test_anything_else_belongs_to_nobody(self, tenants: Tenants, key: str) -> None:
        assert tenants.account_of(key) is None

    def test_hashes_may_be_written_in_capitals(self, path: Path) -> None:
        path.write_text(entry("acme", "key-1").replace(digest("key-1"), digest("key-1").upper()))
        assert Tenants.load(path).account_of("key-1") == "acme"

    def test_an_account_may_have_several_entries(self, path: Path) -> None:
        path.write_text(entry("acme", "key-1") + entry("acme", "key-2", "key-1"))
        assert Tenants.load(path).account_of("key-2") == "acme"


class TestAuthenticate:
    @pytest.mark.parametrize("header", ["Bearer key-1", "bearer key-1", "BEARER  key-1 ", " Bearer key-2"])
    def test_a_bearer_key_names_the_account(self, tenants: Tenants, header: str) -> None:
        assert tenants.authenticate(header) == "acme"
        assert tenants.authenticate(header, "acme") == "acme"

    @pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic a2V5LTE=", "key-1", "Bearer a b"])
    def test_without_a_key_the_header_to_send_is_named(self, tenants: Tenants, header: str | None) -> None:
        with pytest.raises(MissingCredentials, match="Authorization: Bearer"):
            tenants.authenticate(header, "acme")

    def test_an_unknown_key_is_not_let_in(self, tenants: Tenants) -> None:
        with pytest.raises(Unauthenticated) as caught:
            tenants.authenticate("Bearer nope", "acme")
        assert type(caught.value) is Unauthenticated
        assert "nope" not in str(caught.value)

    def test_a_key_opens_no_other_account(self, tenants: Tenants) -> None:
        with pytest.raises(AccountMismatch):
            tenants.authenticate("Bearer key-3", "acme")

    @pytest.mark.parametrize("account", ["", "a" * 65, "a b", "a/b", "ä", "acme\n", "..", "a:b"])
    def test_what_cannot_be_an_account_is_not_found_with_keys_or_without(self, tenants: Tenants, account: str) -> None:
        for who in (tenants, Tenants.open_local()):
            with pytest.raises(NotFound, match="1 to 64"):
                who.authenticate("Bearer key-1", account)

    def test_without_a_file_everybody_is_let_in(self) -> None:
        """As the account that the URL names, or as ``local``."""
        local = Tenants.open_local()
        assert local.authenticate(None) == "local"
        assert local.authenticate("Bearer anything") == "local"
        assert local.authenticate(None, "0123456789abcdef" * 4) == "0123456789abcdef" * 4

    def test_cloudflares_key_header_counts_where_there_is_no_bearer(self, tenants: Tenants) -> None:
        assert bearer_from_headers(None, None) is None
        assert bearer_from_headers("Bearer key-3", "key-1") == "Bearer key-3"
        assert tenants.authenticate(bearer_from_headers(None, "key-1")) == "acme"


class TestOperators:
    @pytest.fixture
    def tenants(self, path: Path) -> Tenants:
        path.write_text(entry("acme", "key-1") + operator("keda", "key-o", "key-p"))
        return Tenants.load(path)

    def test_each_of_their_keys_lets_them_pass(self, tenants: Tenants) -> None:
        for key in ("key-o", "key-p"):
            tenants.authenticate_operator(f"Bearer {key}")

    def test_they_have_no_account(self, tenants: Tenants) -> None:
        with pytest.raises(Unauthenticated):
            tenants.authenticate("Bearer key-o")

    def test_a_tenants_key_is_told_what_it_lacks(self, tenants: Tenants) -> None:
        with pytest.raises(AccountMismatch, match="img2img keys new --operator"):
            tenants.authenticate_operator("Bearer key-1")

    @pytest.mark.parametrize(
        ("header", "error"),
        [(None, MissingCredentials), ("Basic a2V5", MissingCredentials), ("Bearer x", Unauthenticated)],
    )
    def test_others_do_not_pass(self, tenants: Tenants, header: str | None, error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            tenants.authenticate_operator(header)
        assert type(caught.value) is error

    def test_without_a_file_everybody_is_one(self) -> None:
        Tenants.open_local().authenticate_operator(None)


class TestFile:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("", "missing required field `tenants`"),
            ("tenants = []", "no tenants"),
            ("[[tenants]", "is not TOML"),
            ('[[tenants]]\naccount = "acme"', "missing required field `key_sha256`"),
            ('[[tenants]]\naccount = "acme"\nkey_sha256 = []', "tenant 1 ('acme'): key_sha256 is empty"),
            ('[[tenants]]\naccount = "acme"\nkey_sha256 = "abc"', "Expected `array`"),
            ('[[tenants]]\naccount = "acme"\nkeys = []', "unknown field `keys`"),
            (entry("acme", "a") + entry("b c", "b"), "tenant 2 ('b c'): an account id has 1 to 64"),
            (entry("acme", "a") + entry("", "b"), "tenant 2 (''): an account id has 1 to 64"),
            (entry("acme", "a", "b").replace(digest("b"), "xyz"), "tenant 1 ('acme'): key 2 is no SHA-256"),
            (entry("acme", "a").replace(digest("a"), digest("a")[:-1] + "g"), "tenant 1 ('acme'): key 1 is no"),
            (entry("acme", "a") + 'residency = "EU"', "tenant 1 ('acme'): residency is 'EU': write 'any', or 'local'"),
            (entry("acme", "a") + "residency = true", "Expected `str`, got `bool` - at `$.tenants[0].residency`"),
            (entry("acme", "a") + "spend_per_day = -1", "Expected `float` >= 0.0 - at `$.tenants[0].spend_per_day`"),
            (entry("acme", "a") + "spend_per_day = nan", "Expected `float` >= 0.0 - at `$.tenants[0].spend_per_day`"),
            (entry("acme", "a") + operator("b c", "b"), "operator 1 ('b c'): a name has 1 to 64"),
            (entry("acme", "a") + operator("b"), "operator 1 ('b'): key_sha256 is empty"),
            (entry("acme", "a") + operator("b", "c", "a"), "operator 1 ('b'): key 2 belongs to 'acme' too: remove it"),
            (entry("acme", "a") + entry("b", "c", "a"), "tenant 2 ('b'): key 2 belongs to 'acme' too: remove it"),
        ],
    )
    def test_a_wrong_file_is_refused_with_its_name_the_entry_and_a_remedy(
        self, path: Path, content: str, reason: str
    ) -> None:
        path.write_text(content)
        with pytest.raises(ConfigurationError) as caught:
            Tenants.load(path)
        assert str(caught.value).startswith(str(path))
        assert reason in str(caught.value)
        assert any(remedy in str(caught.value) for remedy in ("img2img keys new", "remove it", "rename it", "write"))

    @pytest.mark.parametrize("name", ["missing.toml", "."])
    def test_a_file_that_cannot_be_read_is_refused_with_its_setting(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigurationError, match="IMG2IMG_TENANTS_FILE"):
            Tenants.load(tmp_path / name)

    def test_bytes_that_are_no_text_are_refused(self, path: Path) -> None:
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigurationError, match="is not TOML"):
            Tenants.load(path)


class TestShares:
    def test_without_an_entry_an_account_has_the_common_share(self, tenants: Tenants) -> None:
        """Nor without a file: nobody is kept here, and the pools' own caps count."""
        for who in (tenants, Tenants.open_local()):
            assert who.share_of("nobody", 7) == Share(weight=1.0, max_queued=7, local_only=False, spend_per_day=None)

    def test_an_entry_says_what_its_account_is_entitled_to(self, path: Path) -> None:
        more = 'weight = 2.5\nmax_queued = 3\nresidency = "local"\nspend_per_day = 0\n'
        path.write_text(entry("acme", "key-1") + more + entry("plain", "key-2") + 'residency = "any"\n')
        tenants = Tenants.load(path)
        assert tenants.share_of("acme", 7) == Share(weight=2.5, max_queued=3, local_only=True, spend_per_day=0.0)
        assert tenants.share_of("plain", 7) == Share(max_queued=7)

    @pytest.mark.parametrize("entries", ["", 'residency = "any"\n'])
    def test_a_key_that_was_added_lets_no_picture_out(self, path: Path, entries: str) -> None:
        """Of two entries the first has the say, but ``local`` in either of them counts."""
        local = 'residency = "local"\nspend_per_day = 2\n'
        for first, second, spend in ((local, entries, 2.0), (entries, local, None)):
            path.write_text(entry("acme", "key-1") + first + entry("acme", "key-2") + second)
            share = Tenants.load(path).share_of("acme", 7)
            assert (share.local_only, share.spend_per_day) == (True, spend)


class TestReading:
    def test_a_changed_file_is_read_again(self, watched: Tenants, path: Path) -> None:
        replace(path, entry("acme", "key-9"))
        assert watched.account_of("key-9") == "acme"
        assert watched.account_of("key-1") is None

    def test_a_file_written_in_place_is_read_again(self, watched: Tenants, path: Path) -> None:
        before = path.stat()
        path.write_text(path.read_text().replace(digest("key-1"), digest("key-9")))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert watched.account_of("key-9") == "acme"

    @pytest.mark.parametrize("content", ["[[tenants", "tenants = []", None])
    def test_a_broken_or_missing_file_keeps_the_old_keys_and_warns_once(
        self, watched: Tenants, path: Path, content: str | None
    ) -> None:
        if content is None:
            path.unlink()
        else:
            replace(path, content)
        with capture_logs() as logs:
            assert watched.account_of("key-1") == "acme"
            assert watched.account_of("key-3") == "other-co_2"
        assert [(log["event"], log["log_level"]) for log in logs] == [("tenants_file_ignored", "warning")]
        replace(path, entry("acme", "key-9"))
        assert watched.account_of("key-9") == "acme"
        assert watched.account_of("key-1") is None

    def test_the_file_is_looked_at_once_per_interval(
        self, tenants: Tenants, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gateway.tenants.CHECK_INTERVAL", 3600.0)
        path.unlink()
        with capture_logs() as logs:
            assert tenants.account_of("key-1") == "acme"
        assert logs == []
