"""Images in and out: bytes under a key, until a time. In Redis by default, or in files or a bucket.

Blobs in Redis expire by themselves. Objects do not, so one sorted set in Redis says when each is due; it is
written before the object, so that whatever a crash leaves behind is swept.

obstore's functions run in threads of ours instead of through its async API, which completes futures from
threads that Python does not know of: a process that exits at that moment aborts (2 of 100 short runs did).
The threads are no slower.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit
from uuid import uuid4

import obstore
import structlog
from obstore.exceptions import BaseError, GenericError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store
from redis.exceptions import RedisError

from img2img.errors import ConfigurationError, Unavailable
from img2img.server import CALL_SECONDS, TimedRedis, translated

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

SETTING: Final = "IMG2IMG_BLOBS"
THREADS: Final = 16
PROBE_LIFE: Final = 60_000  # milliseconds
SLOWEST_LINE: Final = 1024 * 1024  # bytes a second
LARGEST_BLOB: Final = 32 * 1024 * 1024  # bytes: an image and a mask
CONNECT_TIMEOUT: Final = timedelta(seconds=3)
REQUEST_TIMEOUT: Final = timedelta(seconds=30)
RETRIES: Final["RetryConfig"] = {"max_retries": 3, "retry_timeout": timedelta(seconds=15)}
# What a URL of each scheme may say after its "?", and the name that obstore has for it.
OPTIONS: Final[dict[str, dict[str, str]]] = {
    "s3": {"endpoint": "endpoint", "region": "region"},
    "gs": {},
    "az": {"account": "account_name", "endpoint": "endpoint"},
}
S3_ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

# Takes due members off the index, except those whose expiry was moved while their objects were deleted.
_FORGET: Final = """
local forgotten = 0
for i = 2, #ARGV do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score and tonumber(score) <= tonumber(ARGV[1]) then
    forgotten = forgotten + redis.call('ZREM', KEYS[1], ARGV[i])
  end
end
return forgotten
"""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class BlobStore(Protocol):
    """Bytes under keys. Times are milliseconds since 1970. Every method raises ``Unavailable``."""

    async def put(self, key: str, data: bytes, expires_at: int) -> None:
        """Store ``data``, in place of what was there."""

    async def get(self, key: str) -> bytes | None:
        """The data; None if it was never there, was deleted or is past its expiry."""

    async def expire(self, key: str, expires_at: int) -> bool:
        """Move the expiry; a time in the past makes the blob unreadable. False if there is no such blob."""

    async def delete(self, key: str) -> None:
        """Delete a blob. A missing key is fine."""

    async def sweep(self, limit: int = 100) -> int:
        """Delete up to ``limit`` blobs that are due, and answer how many; any number of processes may."""


class RedisBlobs:
    """Blobs as strings with a TTL: nothing to sweep, and nothing to set up."""

    def __init__(self, redis: TimedRedis, prefix: str) -> None:
        self._redis = redis
        self._prefix = f"{prefix}blob:"

    async def put(self, key: str, data: bytes, expires_at: int) -> None:
        with translated():
            await self._redis.execute_command(
                "SET", self._prefix + key, data, "PXAT", max(1, expires_at), seconds=_transfer_seconds(len(data))
            )

    async def get(self, key: str) -> bytes | None:
        with translated():
            data: bytes | None = await self._redis.execute_command(
                "GET", self._prefix + key, seconds=_transfer_seconds(LARGEST_BLOB)
            )
        return data

    async def expire(self, key: str, expires_at: int) -> bool:
        with translated():
            return bool(await self._redis.pexpireat(self._prefix + key, expires_at))

    async def delete(self, key: str) -> None:
        with translated():
            await self._redis.unlink(self._prefix + key)

    async def sweep(self, limit: int = 100) -> int:
        return 0


class ObjectBlobs:
    """Blobs as files or as objects in a bucket; ``index_key`` is a sorted set of keys by expiry."""

    def __init__(self, store: ObjectStore, redis: TimedRedis, index_key: str) -> None:
        self._store = store
        self._redis = redis
        self._index = index_key
        self._forget = redis.register_script(_FORGET)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="blobs")

    async def check(self) -> None:
        """Write, read and delete a small object, so that what is wrong shows at start-up.

        Raises:
            ConfigurationError: the store refuses, or there is no such bucket.
            Unavailable: it cannot be reached.
        """
        key = f"probe-{uuid4().hex}"
        try:
            await self.put(key, b"img2img", _now() + PROBE_LIFE)
            if await self.get(key) != b"img2img":
                raise ConfigurationError(f"The blob store forgets what it is given: check {SETTING}")
            await self.delete(key)
        except Unavailable as exc:
            cause = exc.__cause__
            if cause is None or isinstance(cause, RedisError | TimeoutError):  # the queue server's failing
                raise
            why = f"The blob store fails: check {SETTING}, its credentials and what they permit: {_first_line(cause)}"
            raise (Unavailable if isinstance(cause, GenericError) else ConfigurationError)(why) from cause

    async def put(self, key: str, data: bytes, expires_at: int) -> None:
        with translated():
            await self._redis.zadd(self._index, {key: expires_at})
        await self._call(_put, self._store, key, data)

    async def get(self, key: str) -> bytes | None:
        with translated():
            expires_at = await self._redis.zscore(self._index, key)
        if expires_at is None or expires_at <= _now():
            return None
        return await self._call(_get, self._store, key)

    async def expire(self, key: str, expires_at: int) -> bool:
        with translated():
            await self._redis.zadd(self._index, {key: expires_at}, xx=True)
            return await self._redis.zscore(self._index, key) is not None

    async def delete(self, key: str) -> None:
        await self._call(_delete, self._store, key)
        with translated():
            await self._redis.zrem(self._index, key)

    async def sweep(self, limit: int = 100) -> int:
        now = _now()
        with translated():
            due: list[bytes] = await self._redis.zrangebyscore(self._index, "-inf", now, start=0, num=limit)
        if not due:
            return 0
        gone = await self._call(_delete_all, self._store, [key.decode() for key in due])
        with translated():
            return int(await self._forget(keys=[self._index], args=[now, *gone]))

    def close(self) -> None:
        """Let go of the threads; calls under way finish by themselves. Twice is fine."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except (BaseError, OSError) as exc:
            # Where the store is, and who we are there, is the operator's business and not the caller's.
            log.warning("blob_store_failed", error=_first_line(exc))
            raise Unavailable(f"The blob store does not answer as it should ({type(exc).__name__}): try again") from exc


@asynccontextmanager
async def open_blobs(url: str, redis: TimedRedis, prefix: str) -> AsyncIterator[BlobStore]:
    """Open the store that ``url`` names, and try it; ``prefix`` begins every key in Redis.

    ``redis`` | ``file:///folder`` | ``s3://bucket/prefix?endpoint=…&region=…`` | ``gs://bucket/prefix`` |
    ``az://container/prefix?account=…&endpoint=…``; credentials come from the usual ``AWS_*``, ``GOOGLE_*``
    and ``AZURE_*`` variables.

    Raises:
        ConfigurationError: the URL is wrong, or the store refuses to be used.
        Unavailable: the store cannot be reached.
    """
    if url == "redis":
        yield RedisBlobs(redis, prefix)
        return
    blobs = ObjectBlobs(_open_store(url), redis, f"{prefix}blobs")
    try:
        await blobs.check()
        yield blobs
    finally:
        blobs.close()


def _transfer_seconds(size: int) -> float:
    """How long ``size`` bytes may take to or from the queue server, however slow the line."""
    return CALL_SECONDS + size / SLOWEST_LINE


def _open_store(url: str) -> ObjectStore:
    try:
        parts = urlsplit(url)
        if parts.scheme == "file":
            return _open_folder(parts)
        if parts.scheme in OPTIONS:
            return _open_bucket(parts)
    except (BaseError, OSError, ValueError) as exc:
        raise _wrong_url(_first_line(exc)) from exc
    raise _wrong_url(f"{parts.scheme or url!r} is no kind of store")


def _open_folder(parts: SplitResult) -> LocalStore:
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ValueError("a folder is file:///absolute/path, with %3F and %23 for ? and # in it")
    folder = Path(unquote(parts.path))
    # Other people's pictures are nobody else's business.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return LocalStore(folder)


def _open_bucket(parts: SplitResult) -> ObjectStore:
    known = OPTIONS[parts.scheme]
    given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{parts.scheme}:// takes no {', '.join(unknown)}, only: {', '.join(known) or 'a prefix'}")
    if not parts.netloc or "@" in parts.netloc:
        raise ValueError("a bucket's name follows the two slashes, and credentials are not part of the URL")
    config: dict[str, Any] = {known[name]: value for name, value in given.items()}
    config["prefix"] = unquote(parts.path).strip("/") or None
    config["retry_config"] = RETRIES
    config["client_options"] = _client_options(parts.scheme, given.get("endpoint"))
    if parts.scheme == "s3":
        return S3Store(parts.netloc, **config)
    return GCSStore(parts.netloc, **config) if parts.scheme == "gs" else AzureStore(parts.netloc, **config)


def _client_options(scheme: str, endpoint: str | None) -> "ClientConfig":
    if endpoint is None and scheme == "s3":
        endpoint = next((os.environ[name] for name in S3_ENDPOINT_VARIABLES if name in os.environ), None)
    return {
        "connect_timeout": CONNECT_TIMEOUT,
        "timeout": REQUEST_TIMEOUT,
        # Whoever writes http:// means it; everything else stays on TLS.
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
    }


def _wrong_url(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{SETTING}: {reason}: use redis, file:///folder, s3://bucket/prefix?endpoint=…&region=…, "
        "gs://bucket/prefix or az://container/prefix"
    )


def _put(store: ObjectStore, key: str, data: bytes) -> None:
    # In one request: an aborted multipart upload would stay in the bucket, invisible and paid for.
    obstore.put(store, key, data, use_multipart=False)


def _get(store: ObjectStore, key: str) -> bytes | None:
    try:
        return obstore.get(store, key).bytes().to_bytes()
    except FileNotFoundError:
        return None


def _delete(store: ObjectStore, key: str) -> None:
    with suppress(FileNotFoundError):
        obstore.delete(store, key)
    if isinstance(store, LocalStore) and store.prefix is not None:
        # Where obstore writes a file before it renames it: a crash in between leaves it there.
        (store.prefix / f"{key}#1").unlink(missing_ok=True)


def _delete_all(store: ObjectStore, keys: list[str]) -> list[str]:
    """Delete in bulk, or one by one where a missing object or another error gets in the way.

    Raises:
        BaseError, OSError: the first error, if nothing at all could be deleted.
    """
    if not isinstance(store, LocalStore):
        with suppress(BaseError, OSError):
            obstore.delete(store, keys)
            return keys
    gone: list[str] = []
    errors: list[BaseException] = []
    for key in keys:
        try:
            _delete(store, key)
        except (BaseError, OSError) as exc:
            errors.append(exc)
        else:
            gone.append(key)
    if errors and not gone:
        raise errors[0]
    return gone


def _first_line(error: BaseException) -> str:
    # obstore adds pages of debugging output.
    return str(error).partition("\n")[0]


def _now() -> int:
    return int(time.time() * 1000)
