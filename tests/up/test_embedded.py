"""The embedded server: private, durable, one per data folder, gone with its parent."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis as redis_sync
import redis.asyncio as redis

from img2img.embedded import EmbeddedValkey
from img2img.errors import ConfigurationError

HOLDER = """
import asyncio, sys
from pathlib import Path
from img2img.embedded import EmbeddedValkey

async def main():
    async with EmbeddedValkey(Path(sys.argv[1])) as valkey:
        print(valkey.process.pid, valkey.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def _get(url: str, key: str) -> bytes | None:
    async with redis.from_url(url) as client:
        value: bytes | None = await client.get(key)
        return value


async def _set(url: str, key: str, value: str) -> None:
    async with redis.from_url(url) as client:
        await client.set(key, value)


def _hold(folder: Path, script: str = HOLDER) -> tuple[int, str]:
    """Run a server in a process of its own and kill that process; the server's pid and URL."""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid, url = holder.stdout.readline().split()
        with redis_sync.from_url(url) as client:
            client.set("kept", "yes")
        holder.kill()
    assert holder.returncode == -signal.SIGKILL
    return int(pid), url


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended; one that only waits for init to collect it has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("name", ["plain", "a b", "quote\" and ' \\ newline\n", "long" * 50])
async def test_data_outlives_the_server(tmp_path: Path, name: str) -> None:
    """What was written is there after a restart, whatever the folder is called."""
    folder = tmp_path / name
    async with EmbeddedValkey(folder) as valkey:
        await _set(valkey.url, "kept", "yes")
    async with EmbeddedValkey(folder) as valkey:
        assert await _get(valkey.url, "kept") == b"yes"
    assert valkey.log.read_text()


async def test_data_outlives_a_kill(tmp_path: Path) -> None:
    """An acknowledged write survives SIGKILL, and the server comes back on the same socket."""
    async with EmbeddedValkey(tmp_path) as valkey:
        await _set(valkey.url, "kept", "yes")
        url, process = valkey.url, valkey.process
        os.kill(process.pid, signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        await valkey.start()
        assert valkey.url == url
        assert await _get(url, "kept") == b"yes"


async def test_forgetful_for_tests(tmp_path: Path) -> None:
    """``durable=False`` writes no data."""
    async with EmbeddedValkey(tmp_path, durable=False) as valkey:
        await _set(valkey.url, "kept", "no")
    assert not (tmp_path / "appendonlydir").exists()
    assert not (tmp_path / "dump.rdb").exists()


async def test_nobody_else_can_connect(tmp_path: Path) -> None:
    """It has no TCP port, and its socket lies in a folder that only we may enter."""
    async with EmbeddedValkey(tmp_path, durable=False) as valkey:
        async with redis.from_url(valkey.url) as client:
            assert (await client.config_get("port")) == {"port": "0"}
            assert (await client.config_get("maxmemory-policy")) == {"maxmemory-policy": "noeviction"}
        assert valkey.socket.stat().st_mode & 0o077 == 0
        assert valkey.socket.parent.stat().st_mode & 0o077 == 0
    assert not valkey.socket.parent.exists()


async def test_one_server_per_folder(tmp_path: Path) -> None:
    """A second server on the same folder is refused, and the message names who has it."""
    async with EmbeddedValkey(tmp_path, durable=False):
        with pytest.raises(ConfigurationError, match=f"used by process {os.getpid()}"):
            await EmbeddedValkey(tmp_path, durable=False).__aenter__()


async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """After SIGKILL of the parent the server goes too, the data is there, and its socket is tidied up."""
    pid, url = _hold(tmp_path)
    async with EmbeddedValkey(tmp_path) as valkey:
        assert not is_running(pid)
        assert await _get(valkey.url, "kept") == b"yes"
    assert not Path(url.removeprefix("unix://")).parent.exists()


async def test_an_orphan_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the server of a killed run lives on, the folder stays locked and the message gives its pid."""
    monkeypatch.setattr("img2img.embedded.ORPHAN_PATIENCE", 0.2)
    folder, untethered = tmp_path / "data", tmp_path / "untethered.py"
    untethered.write_text("import os, sys\nos.execvp(sys.argv[2], sys.argv[2:])\n")
    change = f"import img2img.children\nimg2img.children.TETHER = {str(untethered)!r}\n"
    pid, _ = _hold(folder, change + HOLDER)
    try:
        with pytest.raises(ConfigurationError, match=f"still used by process {pid} "):
            await EmbeddedValkey(folder).__aenter__()
    finally:
        os.kill(pid, signal.SIGKILL)
    async with EmbeddedValkey(folder) as valkey:
        assert await _get(valkey.url, "kept") == b"yes"


async def test_a_refusal_shows_its_last_words(tmp_path: Path) -> None:
    """Data that the server cannot read ends the start with the server's own reason."""
    async with EmbeddedValkey(tmp_path) as valkey:
        await _set(valkey.url, "kept", "yes")
    for part in (tmp_path / "appendonlydir").glob("*.manifest"):
        part.write_text("nonsense\n")
    with pytest.raises(ConfigurationError, match=r"(?s)exit status 1.*manifest"):
        await EmbeddedValkey(tmp_path).__aenter__()
    assert not [task for task in asyncio.all_tasks() if "reap" in task.get_name()]
