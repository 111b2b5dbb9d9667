"""What goes wrong, and when: a schedule drawn from the seed alone, and the hand that carries it out."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.chaos.fleet import Fleet, Member
from tests.chaos.intensity import Profile


class Kind(StrEnum):
    WORKER_KILL = "worker_kill"
    WORKER_STALL = "worker_stall"
    WORKER_TERM = "worker_term"
    GATEWAY_KILL = "gateway_kill"
    GATEWAY_TERM = "gateway_term"
    SERVER_KILL = "server_kill"
    SERVER_STALL = "server_stall"
    DROP_COMMANDS = "drop_commands"
    DROP_BELLS = "drop_bells"
    BLACK_HOLE = "black_hole"


WEIGHTS: Final = {Kind.WORKER_KILL: 4, Kind.WORKER_STALL: 2, Kind.WORKER_TERM: 2, Kind.BLACK_HOLE: 2}
"""The others count one: between two disturbances of the server there must be time for a worker's death."""
SETTLE: Final = 1.0
"""Seconds after a pause in which a process is still catching up."""


class Fault(msgspec.Struct, frozen=True):
    """``at`` is in seconds from the start, ``pick`` (0 to 1) says whom it meets, ``seconds`` how long it lasts."""

    at: float
    kind: Kind
    pick: float
    seconds: float
    cut: bool


class Done(msgspec.Struct):
    """A fault that was carried out, in seconds since 1970; it was felt until ``ended``."""

    kind: Kind
    target: str
    started: float
    ended: float


def schedule(profile: Profile) -> list[Fault]:
    """The same for the same profile: first each kind once, in some order, then as the dice fall."""
    dice = random.Random(f"faults {profile.seed}")
    kinds, weights = list(Kind), [WEIGHTS.get(kind, 1) for kind in Kind]
    first = dice.sample(kinds, len(kinds))
    faults: list[Fault] = []
    at = 0.0
    while (at := at + dice.uniform(0.5, 1.5) * profile.gap) < profile.seconds:
        kind = first.pop() if first else dice.choices(kinds, weights)[0]
        seconds = _duration(kind, profile, dice)
        faults.append(Fault(round(at, 2), kind, round(dice.random(), 3), round(seconds, 2), dice.random() < 0.5))
    return faults


def _duration(kind: Kind, profile: Profile, dice: random.Random) -> float:
    match kind:
        case Kind.WORKER_STALL:
            return profile.lease * dice.uniform(1.1, 2.0)
        case Kind.SERVER_KILL:
            return dice.uniform(0, profile.longest_outage)
        case Kind.SERVER_STALL:
            return dice.uniform(profile.longest_stall / 8, profile.longest_stall)
        case Kind.BLACK_HOLE:
            return profile.lease * dice.uniform(0.3, 2.0)
    return 0.0


class Injector:
    """Carries out a schedule; ``done`` says what happened to whom."""

    def __init__(self, fleet: Fleet) -> None:
        self.done: list[Done] = []
        self.skipped = 0
        self._fleet = fleet
        self._server = asyncio.Lock()

    async def run(self, faults: Sequence[Fault]) -> None:
        """Return when the last fault is over and everything is as it was."""
        start = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(start + fault.at - asyncio.get_running_loop().time())
                group.create_task(self._inject(fault), name=f"fault-{fault.kind}-{fault.at}")

    async def _inject(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.SERVER_KILL | Kind.SERVER_STALL:
                async with self._server:
                    await self._hurt_server(fault)
            case Kind.DROP_COMMANDS:
                await self._drop(fault, "normal")
            case Kind.DROP_BELLS:
                await self._drop(fault, "pubsub")
            case _:
                await self._hurt_member(fault)

    async def _hurt_server(self, fault: Fault) -> None:
        done = self._begin(fault, "server")
        valkey = self._fleet.valkey
        if fault.kind == Kind.SERVER_KILL:
            valkey.process.kill()
            await valkey.process.wait()
            await asyncio.sleep(fault.seconds)
            await valkey.start()
        else:
            os.kill(valkey.process.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                os.kill(valkey.process.pid, signal.SIGCONT)
        done.ended = time.time()

    async def _drop(self, fault: Fault, clients: str) -> None:
        try:
            async with Redis.from_url(self._fleet.valkey.url, socket_timeout=1) as redis:
                await redis.execute_command("CLIENT", "KILL", "TYPE", clients)
        except (RedisError, OSError):
            self.skipped += 1  # the server is away: there are no connections
            return
        self._begin(fault, f"{clients} connections").ended = time.time()

    async def _hurt_member(self, fault: Fault) -> None:
        member = self._choose(fault)
        if member is None:
            self.skipped += 1
            return
        done = self._begin(fault, member.life.name)
        member.hurt = True
        try:
            await self._hurt(member, fault)
            await member.up.wait()
        finally:
            member.hurt = False
        done.ended = time.time()

    async def _hurt(self, member: Member, fault: Fault) -> None:
        match fault.kind:
            case Kind.WORKER_KILL | Kind.GATEWAY_KILL:
                member.end(signal.SIGKILL)
            case Kind.WORKER_TERM | Kind.GATEWAY_TERM:
                member.end(signal.SIGTERM)
            case Kind.WORKER_STALL:
                member.send(signal.SIGSTOP)
                await asyncio.sleep(fault.seconds)
                member.send(signal.SIGCONT)
                await asyncio.sleep(SETTLE)
            case Kind.BLACK_HOLE if member.proxy is not None:
                with member.proxy.black_hole():
                    await asyncio.sleep(fault.seconds)
                    if fault.cut:
                        member.proxy.cut()
                await asyncio.sleep(SETTLE)

    def _choose(self, fault: Fault) -> Member | None:
        match fault.kind:
            case Kind.GATEWAY_KILL | Kind.GATEWAY_TERM:
                candidates = self._fleet.gateways
            case Kind.BLACK_HOLE:
                candidates = [member for member in self._fleet.members if member.proxy is not None]
            case _:
                candidates = self._fleet.workers
        well = [member for member in candidates if member.is_well]
        return well[int(fault.pick * len(well))] if well else None

    def _begin(self, fault: Fault, target: str) -> Done:
        done = Done(fault.kind, target, time.time(), float("inf"))
        self.done.append(done)
        return done
