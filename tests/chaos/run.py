"""The fault test: real processes under load, hurt at random, then checked for every promise of docs/queue.md.

    python -m tests.chaos.run [--seconds 600] [--seed 7]

The last line of standard output is one JSON object with the counts. What goes wrong, and to whom, follows from
the seed; a run that breaks a rule prints the schedule and each job concerned, keeps all logs, and exits with 1.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from tests.chaos.checker import Violation, check_job, check_records, check_store, check_watched
from tests.chaos.faults import Injector, schedule
from tests.chaos.fleet import Fleet
from tests.chaos.intensity import Profile, quick
from tests.chaos.load import Load
from tests.chaos.pictures import check_pictures
from tests.chaos.report import describe
from tests.chaos.restarts import LIMIT, Crash, Restart, find_crashes, measure_restarts
from tests.chaos.store import Snapshot, read_snapshot, wait_until_idle

UP_SECONDS: Final = 60.0


class Result(msgspec.Struct):
    """How a run went: ``counts`` for the JSON line, and a text about what was broken, empty if nothing was."""

    counts: dict[str, Any]
    report: str


async def run(profile: Profile, folder: Path, *, timed: bool = True) -> Result:
    """One run in an empty ``folder``, which keeps the logs and the server's data; ``timed`` checks times, too."""
    faults = schedule(profile)
    async with Fleet(profile, folder) as fleet, Load(fleet) as load:
        injector = Injector(fleet)
        sending = asyncio.create_task(load.run(), name="load")
        try:
            await injector.run(faults)
        finally:
            sending.cancel()
        await fleet.all_up(UP_SECONDS)
        violations = list(await _drain(fleet, load))
        async with Redis.from_url(fleet.valkey.url) as redis:
            snapshot = await read_snapshot(redis)
        violations += await check_pictures(fleet, snapshot)
    jobs = list(snapshot.jobs.values())
    restarts = measure_restarts(fleet, injector.done, jobs)
    crashes = list(find_crashes(fleet, injector.done, jobs))
    strange = [_unexplained(crash) for crash in crashes if crash.cause is None]
    violations += [*_check(load, snapshot, profile), *strange, *map(Violation, fleet.complaints())]
    if timed:
        violations += [Violation(f"restarted after {late.seconds:.1f} s", late.job_id) for late in _late(restarts)]
    counts = {
        "chaos": profile.seed,
        "seconds": profile.seconds,
        **_count_jobs(load, snapshot),
        "retried_calls": load.retries,
        "resumed_watches": load.resumes,
        "resumed": sum(life.resumed for life in fleet.lives),
        "stale_results_discarded": sum(life.discarded for life in fleet.lives),
        "faults": Counter(done.kind.value for done in injector.done),
        "faults_skipped": injector.skipped,
        **_restart_figures(restarts),
        "crashes": len(crashes),
        "crashes_by_server": sum(crash.cause == "server" for crash in crashes),
        "unexplained": len(strange),
        "violations": len(violations),
    }
    report = describe(profile, faults, injector.done, snapshot.jobs, crashes, violations) if violations else ""
    return Result(counts, report)


async def _drain(fleet: Fleet, load: Load) -> Sequence[Violation]:
    """Let everything come to its end; answers with what does not."""
    stuck = [
        Violation(f"{record.order.key}: its client still waits", record.job_ids[0] if record.job_ids else None)
        for record in await load.done(fleet.profile.patience)
    ]
    async with Redis.from_url(fleet.valkey.url) as redis:
        if not await wait_until_idle(redis, fleet.profile.patience):
            stuck.append(Violation(f"the queue is not empty after {fleet.profile.patience:g} s"))
    return stuck


def _check(load: Load, snapshot: Snapshot, profile: Profile) -> Iterator[Violation]:
    records = {job_id: record for record in load.records for job_id in record.job_ids}
    yield from check_records(load.records, snapshot)
    yield from check_store(snapshot)
    for job_id, stored in snapshot.jobs.items():
        record = records.get(job_id)
        yield from check_job(stored, record, profile)
        if record is not None:
            yield from check_watched(record, stored)


def _count_jobs(load: Load, snapshot: Snapshot) -> dict[str, Any]:
    accepted = {job_id for record in load.records for job_id in record.job_ids}
    jobs = snapshot.jobs.values()
    codes = Counter(stored.outcome.error.code for stored in jobs if stored.outcome and stored.outcome.error)
    kept = {stored.outcome.result.blob for stored in jobs if stored.outcome and stored.outcome.result}
    return {
        "accepted": len(accepted),
        "acknowledgements": sum(len(record.job_ids) for record in load.records),
        "states": Counter(stored.state.value for stored in jobs),
        "errors": codes,
        "lost": len(accepted - snapshot.jobs.keys()) + sum(not stored.state.is_terminal for stored in jobs),
        "duplicate_starts": sum(max(0, len(stored.starts) - 1) for stored in jobs),
        "answered_calls": sum(record.picture is not None for record in load.records),
        "abandoned_calls": sum(record.abandoned for record in load.records),
        "watched": sum(record.watched for record in load.records),
        "stale_pictures": sum(blob.startswith("result:") and blob not in kept for blob in snapshot.blobs),
        "inputs_left": sum(blob.startswith("input:") for blob in snapshot.blobs),
    }


def _restart_figures(restarts: Sequence[Restart]) -> dict[str, Any]:
    """Seconds from a worker's SIGKILL to its job's next start."""
    calm = [restart.seconds for restart in restarts if restart.calm]
    fair = [restart.seconds for restart in restarts if restart.fair]
    return {
        "restarts": len(restarts),
        "restarts_server_up": len(calm),
        "restart_server_up_max_s": round(max(calm), 2) if calm else None,
        "restarts_idle_slot": len(fair),
        "restart_max_s": round(max(fair), 2) if fair else None,
        "restart_p50_s": round(statistics.median(fair), 2) if fair else None,
    }


def _unexplained(crash: Crash) -> Violation:
    what = f"event {crash.seq}: {crash.worker} was lost, but nothing had happened to it or to the server"
    return Violation(what, crash.job_id)


def _late(restarts: Sequence[Restart]) -> list[Restart]:
    return [restart for restart in restarts if restart.fair and restart.seconds > LIMIT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long faults go on (600)")
    parser.add_argument("--seed", type=int, default=7, help="from which everything is drawn (7)")
    parser.add_argument("--quick", action="store_true", help="short leases and many faults, as in the tests")
    parser.add_argument("--crash-limit", type=int, help="deaths of workers that a job may cause (2)")
    given = parser.parse_args()
    profile = (quick if given.quick else Profile)(seed=given.seed, seconds=given.seconds)
    if given.crash_limit is not None:
        profile = msgspec.structs.replace(profile, crash_limit=given.crash_limit)
    folder = Path(tempfile.mkdtemp(prefix="img2img-chaos-"))
    try:
        result = asyncio.run(run(profile, folder, timed=not given.quick))
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped before the end; logs: {folder}\n")
        sys.exit(130)
    if result.report:
        (folder / "report.txt").write_text(result.report)
        sys.stderr.write(f"{result.report}\n\nlogs: {folder}\n")
    else:
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(result.counts) + "\n")
    sys.exit(1 if result.report else 0)


if __name__ == "__main__":
    main()
