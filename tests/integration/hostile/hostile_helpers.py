"""How much memory a process has."""

from pathlib import Path


def peak_megabytes(pid: int) -> int:
    """The most memory that the process ever had resident."""
    return _megabytes(pid, "VmHWM:")


def resident_megabytes(pid: int) -> int:
    return _megabytes(pid, "VmRSS:")


def _megabytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024
