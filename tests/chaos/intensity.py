"""How long, how fast and how hard: the numbers of a run."""

import msgspec


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds; ``rate`` is jobs a second, ``gap`` the mean time from one fault to the next."""

    seed: int
    seconds: float
    lease: float = 6.0
    beat: float = 2.0
    drain_timeout: float = 2.0
    rate: float = 4.0
    gap: float = 4.0
    longest_stall: float = 8.0
    longest_outage: float = 3.0
    patience: float = 90.0
    gateways: int = 2
    workers: int = 3
    slots: int = 4
    attempts: int = 3
    retry_delay: float = 0.3
    crash_limit: int = 2
    checkpoint_interval: float = 0.5
    preview_interval: float = 0.2


def quick(*, seed: int, seconds: float) -> Profile:
    """Everything shorter, so that a run of some seconds meets every kind of fault."""
    return Profile(
        seed=seed,
        seconds=seconds,
        lease=1.5,
        beat=0.4,
        drain_timeout=0.5,
        rate=6.0,
        gap=1.0,
        longest_stall=2.0,
        longest_outage=1.0,
        patience=60.0,
        checkpoint_interval=0.1,
        preview_interval=0.0,
    )
