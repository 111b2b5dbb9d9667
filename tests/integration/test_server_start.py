"""Which servers a process starts on, how long it waits for one, and what it says."""

import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.sockets import listen
from img2img.errors import ConfigurationError, Unavailable
from img2img.server import check_server, open_redis
from img2img.settings import Settings
from tests.stack import Process, eventually
from tests.up.running import Terminal, run
from tests.valkey import ValkeyServer

REMEDY = r"use redis://\[user:password@\]host:6379/0, unix:///path/to/socket, or redis\+sentinel://"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A server with a user that has no rights, and one that has all."""
    users = ("user nobody on >secret -@all", "user img2img on >p%3Aw ~* &* +@all")
    with ValkeyServer(tmp_path_factory.mktemp("server"), *users) as server:
        yield server


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:6379", "it must begin with"),
        ("127.0.0.1:6379", "it must begin with"),
        ("redis://", "it names no host"),
        ("redis://:6379/0", "it names no host"),
        ("redis://127.0.0.1:port/0", "a port is no number"),
        ("redis://user:hush/hush@127.0.0.1:6379/0", "a port is no number"),
        ("redis://user:hush#hush@127.0.0.1:6379/0", "there is a #"),
        ("redis://user:hush[hush@127.0.0.1:6379/0", "it cannot be read"),
        ("redis://127.0.0.1:6379/first", "the database must be a number"),
        ("redis://127.0.0.1,127.0.0.2/0", "only sentinels can be several"),
        (
            "redis://127.0.0.1/0?decode_responses=hush",
            "after the [?] it takes only client_name, db, password, use",
        ),
        ("redis://127.0.0.1/0?ssl_ca_certs=hush", "after the [?] it takes only"),
        ("redis://127.0.0.1/0?db=hush", "it cannot be read"),
        ("redis+sentinel://127.0.0.1:26379", "the master's name"),
        ("redis+sentinel://127.0.0.1:26379,:26380/main", "it names no host"),
        ("redis+sentinel://127.0.0.1:26379/main/first", "the database must be a number"),
        ("redis+sentinel://127.0.0.1:26379/main?sentinel_pass=hush", "after the [?] it takes only .*sentinel_password"),
    ],
)
async def test_a_wrong_url_is_refused_with_its_remedy(url: str, reason: str) -> None:
    """Before anything is connected, in one line, without repeating what may be a password."""
    with pytest.raises(ConfigurationError, match=f"IMG2IMG_REDIS_URL: {reason}.*{REMEDY}") as caught:
        async with open_redis(url):
            pass
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["ssl_ca_certs=/nowhere.pem", "ssl_cert_reqs=maybe", "ssl_ca_data=hush"])
@pytest.mark.parametrize("address", ["rediss://127.0.0.1:1/0", "rediss+sentinel://127.0.0.1:1/main"])
async def test_certificates_that_cannot_be_used_are_a_wrong_setting(address: str, option: str) -> None:
    """Told at the start, and not as a server that cannot be reached."""
    with pytest.raises(ConfigurationError, match="IMG2IMG_REDIS_URL: its ssl_ options cannot be used"):
        async with open_redis(f"{address}?{option}"):
            pass


async def test_a_password_may_hold_anything(server: ValkeyServer) -> None:
    """Special characters are escaped in the URL."""
    async with open_redis(f"redis://img2img:p%253Aw@127.0.0.1:{server.port}/3") as redis:
        await check_server(redis, patience=0)
        assert (await redis.client_info())["db"] == 3


@pytest.mark.parametrize("user", ["img2img:wrong", "nobody:secret", "unknown:"])
async def test_a_server_that_does_not_let_us_in_is_a_wrong_setting(server: ValkeyServer, user: str) -> None:
    """Waiting would not help; the message says what to check."""
    async with open_redis(f"redis://{user}@127.0.0.1:{server.port}/0") as redis:
        with pytest.raises(ConfigurationError, match="check user and password in IMG2IMG_REDIS_URL"):
            await check_server(redis)


async def test_a_server_that_forgets_is_used_and_told(tmp_path: Path) -> None:
    """Without an append-only file a restart loses jobs: worth a warning, but some want just that."""
    for config, expected in (("appendonly no", ["queue_server_forgets"]), ("appendonly yes", [])):
        with ValkeyServer(tmp_path / config, config) as server, capture_logs() as logs:
            async with open_redis(server.url) as redis:
                await check_server(redis, patience=0)
        assert [entry["event"] for entry in logs] == expected


@pytest.mark.parametrize("kind", ["gateway", "worker"])
def test_a_server_that_comes_later_is_waited_for(tmp_path: Path, kind: str) -> None:
    """Processes and their server may start in any order; that one waits is told once."""
    server = ValkeyServer(tmp_path / "server", "appendonly yes")
    settings = {"REDIS_URL": server.url, "ENGINE": "fake", "HTTP_PORT": "0", "GRPC_PORT": "0", "METRICS_PORT": "0"}
    environment = {f"IMG2IMG_{name}": value for name, value in settings.items()}
    with closing(Process(kind, f"{kind}_ready", environment, tmp_path / "log")) as process:
        eventually(lambda: waits(process), "it waits")
        with server:
            process.wait_ready()
            assert waits(process) == 1


@pytest.mark.parametrize("kind", ["gateway", "worker"])
def test_ctrl_c_ends_the_wait_quietly(kind: str, unused_tcp_port: int) -> None:
    environment = {"IMG2IMG_REDIS_URL": f"redis://127.0.0.1:{unused_tcp_port}/0", "IMG2IMG_METRICS_PORT": "-1"}
    with Terminal(kind, IMG2IMG_ENGINE="fake", IMG2IMG_HTTP_PORT="0", IMG2IMG_GRPC_PORT="0", **environment) as terminal:
        terminal.shows("waiting_for_queue_server")
        terminal.press_ctrl_c()
        assert terminal.wait() == -signal.SIGINT
    assert "Traceback" not in terminal.text


def waits(process: Process) -> int:
    """How often it said that it waits."""
    return sum(entry["event"] == "waiting_for_queue_server" for entry in process.entries())


async def test_a_server_that_does_not_come_is_unavailable() -> None:
    """The message names the setting and the reason."""
    async with open_redis("redis://127.0.0.1:1/0") as redis:
        with pytest.raises(Unavailable, match=r"has not answered for 0 s: .*IMG2IMG_REDIS_URL: .*127\.0\.0\.1:1"):
            await check_server(redis, patience=0)


@pytest.mark.parametrize("setting", ["http_port", "grpc_port", "scaler_port"])
def test_a_port_that_is_taken_is_one_line(setting: str, server: ValkeyServer) -> None:
    """With why, and the settings to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"IMG2IMG_HTTP_PORT": "0", "IMG2IMG_GRPC_PORT": "0", f"IMG2IMG_{setting.upper()}": str(port)}
        ended = run("gateway", IMG2IMG_REDIS_URL=server.url, IMG2IMG_LOG_LEVEL="error", **ports)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"img2img gateway: Cannot listen on 127.0.0.1:{port} (Address already in use): end what uses the port, "
        f"or change IMG2IMG_{setting.upper()} (or IMG2IMG_HOST)\n"
    )


def test_a_host_that_is_not_ours_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"\(or IMG2IMG_HOST\)"):
        listen(Settings(host="192.0.2.1"), "http_port")
