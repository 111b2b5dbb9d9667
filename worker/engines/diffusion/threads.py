"""How many threads torch has on the CPU, and how they wait for each other: imported before torch, whose OpenMP reads
both when loaded.

By default they spin, which is a little faster alone and a disaster beside any other busy process: the one that has
lost its core is waited for by the others at full speed. Measured on two cores beside other busy processes, a picture
of 20 steps with the bundled model: 1.4 to 51 s spinning, 2.0 to 2.7 s asleep.

OpenMP also makes a thread for each of the machine's cores, whatever share of them a container has. So many use up that
share at the begin of each period, and stand still for the rest of it.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time that the container has in each period, or ``max``, and the period."""


def set_threads(environment: MutableMapping[str, str], cpu_max: Path = CPU_MAX) -> None:
    """Say in ``environment`` what OpenMP is to do, where it does not say so itself."""
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        quota, period = map(int, cpu_max.read_text().split())
    except (OSError, ValueError):
        return  # no such limit
    cpus = max(1, math.ceil(quota / period))
    if cpus < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(cpus))


set_threads(os.environ)
