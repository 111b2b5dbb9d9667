"""One suite over every blob store: Redis, files and S3, against real servers on loopback."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
from moto.server import ThreadedMotoServer
from redis.asyncio import ConnectionPool
from structlog.testing import capture_logs

from img2img.blobs import BlobStore, ObjectBlobs, open_blobs
from img2img.errors import ConfigurationError, Unavailable
from img2img.server import TimedRedis, open_redis

PREFIX = "img2img:{0}:"
INDEX = f"{PREFIX}blobs"
HOUR = 3_600_000
STORES = ("redis", "file", "s3")


def in_an_hour() -> int:
    return int(time.time() * 1000) + HOUR


def an_hour_ago() -> int:
    return int(time.time() * 1000) - HOUR


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[TimedRedis]:
    async with open_redis(valkey_url) as client:
        await client.flushall()
        yield client


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="pictures")
    client.close()
    return f"s3://pictures/a%20prefix?endpoint={s3_endpoint}&region=us-east-1"


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{quote(str(tmp_path / 'made for blobs'))}"
    return "redis" if request.param == "redis" else str(request.getfixturevalue("s3_url"))


@pytest.fixture
async def blobs(url: str, redis: TimedRedis) -> AsyncIterator[BlobStore]:
    async with open_blobs(url, redis, PREFIX) as store:
        yield store


class TestEveryStore:
    async def test_what_is_put_can_be_got(self, blobs: BlobStore) -> None:
        data = os.urandom(6 * 1024 * 1024)
        await blobs.put("result:0-abc.1", data, in_an_hour())
        got = await blobs.get("result:0-abc.1")
        assert type(got) is bytes
        assert got == data

    @pytest.mark.parametrize("data", [b"", b"\x00"])
    async def test_even_the_smallest_blob_is_not_none(self, blobs: BlobStore, data: bytes) -> None:
        await blobs.put("k", data, in_an_hour())
        assert await blobs.get("k") == data

    async def test_a_key_that_was_never_put_is_none(self, blobs: BlobStore) -> None:
        assert await blobs.get("nothing") is None

    async def test_put_replaces_data_and_expiry(self, blobs: BlobStore) -> None:
        await blobs.put("k", b"one", an_hour_ago())
        await blobs.put("k", b"two", in_an_hour())
        assert await blobs.get("k") == b"two"
        assert await blobs.sweep() == 0
        assert await blobs.get("k") == b"two"

    async def test_a_blob_past_its_expiry_is_none_without_a_sweep(self, blobs: BlobStore) -> None:
        await blobs.put("k", b"old", an_hour_ago())
        assert await blobs.get("k") is None

    async def test_a_deleted_blob_is_none_and_deleting_again_is_fine(self, blobs: BlobStore) -> None:
        await blobs.put("k", b"data", in_an_hour())
        await blobs.delete("k")
        await blobs.delete("k")
        assert await blobs.get("k") is None

    async def test_the_expiry_can_be_moved_both_ways(self, blobs: BlobStore) -> None:
        await blobs.put("k", b"data", int(time.time() * 1000) + 60_000)
        await blobs.expire("k", in_an_hour())
        assert await blobs.get("k") == b"data"
        await blobs.expire("k", an_hour_ago())
        assert await blobs.get("k") is None

    async def test_moving_the_expiry_of_nothing_makes_nothing(self, blobs: BlobStore, redis: TimedRedis) -> None:
        await blobs.expire("nothing", in_an_hour())
        assert await blobs.get("nothing") is None
        assert await redis.keys() == []

    async def test_keys_do_not_meet(self, blobs: BlobStore) -> None:
        for key in ("a", "a:b", "a.b", "a-b", "A"):
            await blobs.put(key, key.encode(), in_an_hour())
        await blobs.delete("a")
        for key in ("a:b", "a.b", "a-b", "A"):
            assert await blobs.get(key) == key.encode()

    async def test_many_at_once_are_fine(self, blobs: BlobStore) -> None:
        await asyncio.gather(*(blobs.put(str(i), b"%d" % i, in_an_hour()) for i in range(40)))
        assert await asyncio.gather(*(blobs.get(str(i)) for i in range(40))) == [b"%d" % i for i in range(40)]

    async def test_nothing_is_left_in_redis_without_an_expiry_but_the_index(
        self, blobs: BlobStore, redis: TimedRedis
    ) -> None:
        await blobs.put("k", b"data", in_an_hour())
        for key in await redis.keys():
            assert key == INDEX.encode() or await redis.pttl(key) > 0
        await blobs.delete("k")
        assert await redis.keys() == []

    async def test_a_redis_that_goes_away_is_told_as_unavailable(self, blobs: BlobStore, redis: TimedRedis) -> None:
        await redis.connection_pool.disconnect()
        redis.connection_pool = ConnectionPool(host="127.0.0.1", port=1)
        for call in (
            lambda: blobs.put("k", b"", in_an_hour()),
            lambda: blobs.get("k"),
            lambda: blobs.expire("k", in_an_hour()),
            lambda: blobs.delete("k"),
        ):
            with pytest.raises(Unavailable):
                await call()


@pytest.mark.parametrize("url", ["file", "s3"], indirect=True)
class TestSweep:
    async def test_due_blobs_go_and_others_stay(self, blobs: BlobStore, redis: TimedRedis) -> None:
        await blobs.put("due", b"1", an_hour_ago())
        await blobs.put("kept", b"2", in_an_hour())
        assert await blobs.sweep() == 1
        assert await blobs.sweep() == 0
        assert await redis.zrange(INDEX, 0, -1) == [b"kept"]
        # Shown again, the object itself is gone.
        await redis.zadd(INDEX, {"due": in_an_hour()})
        assert await blobs.get("due") is None
        assert await blobs.get("kept") == b"2"

    async def test_one_sweep_is_bounded(self, blobs: BlobStore) -> None:
        for number in range(5):
            await blobs.put(f"k{number}", b"x", an_hour_ago())
        assert [await blobs.sweep(2), await blobs.sweep(2), await blobs.sweep(2)] == [2, 2, 1]

    async def test_an_entry_whose_object_was_never_written_is_swept_with_the_others(
        self, blobs: BlobStore, redis: TimedRedis
    ) -> None:
        """What a crash between index and object leaves behind."""
        await redis.zadd(INDEX, {"lost": an_hour_ago()})
        await blobs.put("due", b"1", an_hour_ago())
        assert await blobs.sweep() == 2
        assert await redis.exists(INDEX) == 0

    async def test_the_half_written_file_of_a_crash_is_swept(
        self, blobs: BlobStore, url: str, redis: TimedRedis, tmp_path: Path
    ) -> None:
        """obstore writes to ``<name>#1`` first; it would list and delete no such file itself."""
        half = tmp_path / "made for blobs" / "input:0-x#1"
        half.parent.mkdir(exist_ok=True)
        half.write_bytes(b"half")
        await redis.zadd(INDEX, {"input:0-x": an_hour_ago()})
        assert await blobs.sweep() == 1
        assert half.exists() == url.startswith("s3")

    async def test_two_sweeps_at_once_count_each_blob_once(self, blobs: BlobStore) -> None:
        for number in range(20):
            await blobs.put(f"k{number}", b"x", an_hour_ago())
        assert sum(await asyncio.gather(blobs.sweep(), blobs.sweep(), blobs.sweep())) == 20

    async def test_an_expiry_moved_meanwhile_keeps_its_entry(self, blobs: BlobStore, redis: TimedRedis) -> None:
        """The entry must outlive the sweep, or the new blob under the same key would never be swept."""
        await redis.zadd(INDEX, {"k": an_hour_ago()})
        assert isinstance(blobs, ObjectBlobs)
        sweeping = asyncio.create_task(blobs.sweep(), name="sweep")
        while not sweeping.done():
            await redis.zadd(INDEX, {"k": in_an_hour()})
        assert await redis.zscore(INDEX, "k") is not None


class TestOpening:
    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("", "no kind of store"),
            ("memcached", "no kind of store"),
            ("ftp://host/x", "no kind of store"),
            ("/var/blobs", "no kind of store"),
            ("file://host/folder", "file:///absolute/path"),
            ("file:folder", "file:///absolute/path"),
            ("file:///folder?mode=1", "file:///absolute/path"),
            ("file:///dev/null/x", "Not a directory"),
            ("s3://", "bucket's name"),
            ("s3:///prefix", "bucket's name"),
            ("s3://key:secret@bucket/x", "bucket's name"),
            ("s3://[bucket", "Invalid IPv6"),
            ("s3://bucket?regoin=x", "takes no regoin"),
            ("s3://bucket?region", "bad query field"),
            ("gs://bucket?region=x", "takes no region"),
            ("az://", "bucket's name"),
        ],
    )
    async def test_a_wrong_url_is_refused_with_setting_and_remedy(
        self, redis: TimedRedis, url: str, reason: str
    ) -> None:
        with pytest.raises(ConfigurationError) as caught:
            async with open_blobs(url, redis, PREFIX):
                pass
        assert str(caught.value).startswith("IMG2IMG_BLOBS: ")
        assert reason in str(caught.value)
        assert "use redis, file:///folder, s3://bucket" in str(caught.value)
        assert "secret" not in str(caught.value)

    async def test_a_folder_is_made_for_its_owner_only_and_kept_clean(self, redis: TimedRedis, tmp_path: Path) -> None:
        folder = tmp_path / "deep" / "a b?#"
        async with open_blobs(f"file://{quote(str(folder))}", redis, PREFIX):
            assert folder.stat().st_mode & 0o077 == 0
            assert list(folder.iterdir()) == []

    async def test_a_bucket_that_does_not_exist_is_told_at_start(self, redis: TimedRedis, s3_url: str) -> None:
        with pytest.raises(ConfigurationError, match="IMG2IMG_BLOBS"):
            async with open_blobs(s3_url.replace("//pictures", "//missing"), redis, PREFIX):
                pass

    async def test_an_endpoint_that_does_not_answer_is_told_at_start(self, redis: TimedRedis, s3_url: str) -> None:
        with pytest.raises(Unavailable, match="IMG2IMG_BLOBS"):
            async with open_blobs("s3://b?endpoint=http://127.0.0.1:1&region=us-east-1", redis, PREFIX):
                pass

    async def test_azure_is_asked_at_the_endpoint_given(
        self, redis: TimedRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1/pictures/a/probe-"):
            async with open_blobs("az://pictures/a?account=dev&endpoint=http://127.0.0.1:1", redis, PREFIX):
                pass

    async def test_a_redis_that_is_not_there_is_unavailable_and_no_wrong_setting(self, tmp_path: Path) -> None:
        async with open_redis("redis://127.0.0.1:1/0") as nowhere:
            with pytest.raises(Unavailable):
                async with open_blobs(f"file://{tmp_path}", nowhere, PREFIX):
                    pass

    async def test_a_failed_start_leaves_nothing_that_no_sweep_would_find(
        self, redis: TimedRedis, tmp_path: Path
    ) -> None:
        (tmp_path / "taken").touch()
        with pytest.raises(ConfigurationError):
            async with open_blobs(f"file://{tmp_path / 'taken'}", redis, PREFIX):
                pass
        assert await redis.keys() == []

    async def test_the_endpoint_may_come_from_the_usual_variable(
        self, redis: TimedRedis, s3_url: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        async with open_blobs("s3://pictures", redis, PREFIX) as store:
            await store.put("k", b"data", in_an_hour())
            assert await store.get("k") == b"data"

    async def test_a_store_that_stops_answering_is_unavailable(
        self, redis: TimedRedis, s3_url: str, tmp_path: Path
    ) -> None:
        folder = tmp_path / "blobs"
        async with open_blobs(f"file://{folder}", redis, PREFIX) as store:
            folder.rmdir()
            folder.touch()
            with capture_logs() as logs, pytest.raises(Unavailable) as caught:
                await store.put("k", b"data", in_an_hour())
        # Callers are not told where it is, operators are.
        assert "blob store" in str(caught.value)
        assert folder.name not in str(caught.value)
        assert any(folder.name in entry.get("error", "") for entry in logs)
