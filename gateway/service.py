"""The job service: all that a front end may ask. Accounts are checked here, so that no front end can forget.

Every method raises ``Unavailable`` when the queue server or the blob store cannot be reached.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

import msgspec
import structlog

from gateway.attendance import Attendance, end_of, waiting
from gateway.routing import Routed, Router
from gateway.tenants import Tenants
from img2img import telemetry, tracing
from img2img.batches import BatchStore
from img2img.blobs import BlobStore
from img2img.errors import (
    Congested,
    IdempotencyConflict,
    Img2ImgError,
    InvalidRequest,
    JobNotFound,
    NoCapacity,
    NotReplayable,
    ResultGone,
    ResultNotReady,
)
from img2img.events import READ_LIMIT, EventHub
from img2img.jobs import Job, JobEvent, JobSpec, JobState, Outcome, Result, StopReason
from img2img.queue import JobQueue
from img2img.queue_types import INPUT_BLOB, Join, Lifetime, Page, ServiceStats, Submitted, Waiter
from img2img.requests import CheckedRequest, build_request, draw_seed
from img2img.server import milliseconds
from img2img.settings import Settings
from img2img.spending import Spending
from img2img.wiring import Parts

THREAD_ABOVE: Final = 16 * 1024
"""Requests with more picture bytes than this are checked and hashed in a thread. 64 KiB would be too many: they may
hold 60 MB of compressed text, which takes 150 ms to unpack."""
KEEP_ALIVE: Final = 15.0
INPUT_MARGIN: Final = 3600.0

log = structlog.get_logger(__name__)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a front end hands over: decoded but unchecked ``body`` and ``options``, and who asks.

    ``deadline`` is the caller's own, in seconds from now; ``idempotency_key`` is the caller's text;
    ``retry`` is how a synchronous call without such a key finds its first try: None never, False leaves a
    trace for a later retry, True follows it.
    """

    front_end: str
    account: str
    body: object
    options: object = None
    deadline: float | None = None
    idempotency_key: str | None = None
    retry: bool | None = None


class Picture(msgspec.Struct, frozen=True):
    """A finished picture: the encoded file and what is known of it."""

    job_id: str
    data: bytes
    result: Result


class JobService:
    """One per gateway process."""

    def __init__(self, parts: Parts, hub: EventHub, tenants: Tenants, router: Router) -> None:
        self._settings: Settings = parts.settings
        self._queue: JobQueue = parts.queue
        self._blobs: BlobStore = parts.blobs
        self._hub = hub
        self._tenants = tenants
        self._router = router
        self.queues = {name: self._queue_of(name) for name in (self._queue.name, *router.pools.by_name)}
        """Of each pool, and the one that the settings name: idempotency keys belong to that."""
        self._batches = BatchStore(parts.queue)
        self.draining = False

    def _queue_of(self, pool: str) -> JobQueue:
        return self._queue if pool == self._queue.name else self._queue.sibling(pool)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of models that a request may ask for in its options."""
        return self._router.models

    def drain(self) -> None:
        """Let go of everybody who only watches; calls that create something are finished."""
        self.draining = True
        self._hub.ring_all()

    async def create(self, order: Order, waiter: Waiter | None = None, job_id: str | None = None) -> Submitted:
        """Check, store and queue a request, or join the job that it repeats.

        Raises:
            InvalidRequest: names the field.
            IdempotencyConflict, NoCapacity, Congested: see :meth:`JobQueue.submit`.
            ModelNotFound, Unsupported, ResidencyConflict: see :meth:`Router.candidates`.
        """
        with telemetry.counting_rejections():
            submitted = await self._submit(order, await self._check(order), waiter, job_id)
        tracing.name_job(submitted.id)
        return submitted

    async def generate(self, order: Order, *, timeout: float, grace: float) -> tuple[str, Outcome]:
        """Create a job and wait for its end; see :meth:`attend`."""
        async with self.attend(order, grace) as attendance:
            del order  # the caller may wait for long, and its picture is stored
            return attendance.job_id, await attendance.outcome(timeout)

    @asynccontextmanager
    async def attend(self, order: Order, grace: float) -> AsyncIterator[Attendance]:
        """Create a job that ends ``grace`` seconds after the block is left, unless it has ended or others wait.

        Raises as :meth:`create` does.
        """
        job_id = self._queue.new_id()
        async with waiting(self._queue, job_id, grace) as (waiter, attended):
            submitted = await self.create(order, waiter, job_id)
            del order
            attended[:] = [submitted.id]
            yield Attendance(submitted.id, self._hub, attended)

    async def get(self, account: str, job_id: str, wait: float = 0.0) -> Job:
        """The job; with ``wait``, as soon as it has ended, or as it stands after that many seconds.

        Raises:
            JobNotFound: there is none on this account.
        """
        job = await self._queue.get(job_id, account)
        if job.is_terminal or wait <= 0:
            return job
        async with self._hub.follow(job_id) as follower:
            await end_of(follower, min(wait, self._settings.max_wait), lambda: self.draining)
        return await self._queue.get(job_id, account)

    async def list_jobs(
        self, account: str, *, state: JobState | None = None, cursor: str | None = None, limit: int = 20
    ) -> Page:
        """The account's jobs, newest first; ``cursor`` is the last page's ``next``."""
        return await self._queue.list_jobs(account, state=state, cursor=cursor, limit=limit)

    async def watch(self, account: str, job_id: str, after: int = 0) -> AsyncIterator[list[JobEvent]]:
        """The job's events after sequence number ``after``, up to the one that ended it; empty lists keep alive.

        Ends early when the process drains: the caller resumes elsewhere from the last number it saw.

        Raises:
            JobNotFound: there is none on this account.
        """
        job = await self._queue.get(job_id, account)
        async with self._hub.follow(job_id, after) as follower:
            events = await follower.read()
            while events or not job.is_terminal:
                yield events
                if self.draining or (0 < len(events) < READ_LIMIT and events[-1].is_terminal):
                    return
                events = await follower.next(KEEP_ALIVE)
                if not events:
                    # Somebody who asks for numbers beyond the last one would never see the terminal event.
                    job = await self._queue.get(job_id, account)
                    events = await follower.read() if job.is_terminal else events

    async def cancel(self, account: str, job_id: str) -> Job:
        """Ask the job to stop, in any state, as often as wanted; answers with the job as it stands then.

        Raises:
            JobNotFound: there is none on this account.
        """
        await self._queue.get(job_id, account)
        await self._queue.cancel(job_id, StopReason.USER)
        return await self._queue.get(job_id, account)

    async def replay(self, account: str, job_id: str) -> Job:
        """Run a failed, canceled or expired job again under its id; one that waits or runs goes on as it is.

        Raises:
            JobNotFound: there is none on this account.
            NotReplayable: it succeeded, or its input has been deleted.
        """
        job = await self._queue.get(job_id, account)
        seconds = job.spec.options.deadline_seconds or self._settings.max_job_age
        lifetime = Lifetime(seconds, self._settings.job_retention)
        if job.state == JobState.SUCCEEDED:
            raise NotReplayable("The job succeeded: send its request anew to have another picture")
        if job.is_terminal:
            if job.spec.inputs and not await self._blobs.expire(job.spec.inputs, self._inputs_expiry(lifetime)):
                raise NotReplayable("The job's input picture is no longer stored: send the request anew")
            await self._queue.replay(job_id, seconds)
            log.info("job_replayed", job=job_id, account=account)
        return await self._queue.get(job_id, account)

    async def result(self, account: str, job_id: str) -> Picture:
        """The finished picture.

        Raises:
            JobNotFound: there is none on this account.
            ResultNotReady: the job has not succeeded (yet).
            ResultGone: its picture was deleted after the retention time.
        """
        job = await self._queue.get(job_id, account)
        outcome = job.outcome
        if outcome is None:
            raise ResultNotReady(f"The job is {job.state}: wait for it, or watch its events")
        return await self.picture(job_id, outcome)

    async def picture(self, job_id: str, outcome: Outcome) -> Picture:
        """The picture of an outcome; raises as :meth:`result` does."""
        result = outcome.result
        if result is None:
            reason = "" if outcome.error is None else f" ({outcome.error.message})"
            raise ResultNotReady(f"The job {outcome.state} without a picture{reason}")
        data = None
        if time.time() * 1000 < result.expires_at:
            data = await self._blobs.get(result.blob)
        if data is None:
            raise ResultGone("The picture was deleted after its retention time: send the request again")
        return Picture(job_id, data, result)

    async def create_batch(self, account: str, orders: Sequence[Order], references: Sequence[object]) -> str:
        """Queue every order, or none; answers with the batch's id.

        Raises:
            InvalidRequest: names the first request that is wrong, as ``/requests/<index>``.
        """
        with telemetry.counting_rejections():
            checked = []
            for index, order in enumerate(orders):
                try:
                    checked.append(await self._check(order))
                except InvalidRequest as exc:
                    raise type(exc)(f"requests/{index}/{exc.field}", f"request {index}: {exc.reason}") from exc
            job_ids: list[str] = []
            try:
                for order, request in zip(orders, checked, strict=True):
                    # Noted first: a submit that seems to fail may have been accepted all the same.
                    job_ids.append(self._queue.new_id())
                    await self._submit(order, request, job_id=job_ids[-1], apart=True)
                keep = self._settings.max_job_age + self._settings.job_retention
                return await self._batches.put(account, job_ids, references, keep)
            except (Img2ImgError, asyncio.CancelledError):
                await asyncio.shield(self._take_back(job_ids))
                raise

    async def get_batch(self, account: str, batch_id: str) -> tuple[list[Job], list[object]]:
        """The batch's jobs in the order of its requests, and the references that came with them.

        Raises:
            JobNotFound: no such batch on this account.
        """
        job_ids, references = await self._batches.get(account, batch_id)
        return [await self._queue.get(job_id, account) for job_id in job_ids], references

    async def stats(self) -> ServiceStats:
        """How much waits and runs, and which workers are alive: in each pool, and in all of them."""
        names = tuple(self._router.pools.by_name)
        pools = await asyncio.gather(*(self.queues[name].stats() for name in names))
        return ServiceStats.of(dict(zip(names, pools, strict=True)))

    async def spent_today(self) -> dict[str, tuple[float, float | None]]:
        """What calls came to on this day (UTC) in each pool that has a price, and the cap on that, if there is one."""
        caps = {name: pool.spend_per_day for name, pool in self._router.pools.by_name.items() if pool.is_priced}
        spent = await Spending(self._queue.redis).today_in(tuple(caps)) if caps else {}
        return {name: (amount, caps[name]) for name, amount in spent.items()}

    async def _check(self, order: Order) -> Routed:
        limits, body = self._settings.request_limits, order.body
        size = 0
        if isinstance(body, dict):
            size = sum(
                len(body[name]) for name in ("image", "image_b64", "mask") if isinstance(body.get(name), bytes | str)
            )
        if size > THREAD_ABOVE:
            checked = await asyncio.to_thread(build_request, body, order.options, limits, order.deadline)
        else:
            checked = build_request(body, order.options, limits, order.deadline)
        if self._settings.reproducible:
            checked = checked.reproducibly()
        share = self._tenants.share_of(order.account, self._settings.max_queued_per_tenant)
        return Routed(checked, share, self._router.candidates(checked, share))

    async def _submit(
        self, order: Order, routed: Routed, waiter: Waiter | None = None, job_id: str | None = None, apart: bool = False
    ) -> Submitted:
        checked, share, pools = routed.checked, routed.share, routed.pools
        lifetime = self._lifetime(order, checked)
        job_id = job_id or self._queue.new_id()
        with tracing.send_span(pools[0].name, job_id, apart=apart) as sending:
            inputs = await self._store_inputs(job_id, checked, lifetime)
            try:
                spec = await self._spec(order, checked, job_id, inputs, sending.carrier)
            except BaseException:
                await asyncio.shield(self._drop(inputs))
                raise
            join = self._join(order, spec.fingerprint)
            try:
                submitted = await self._queue.submit(spec, lifetime, share=share, join=join, waiter=waiter, pools=pools)
            except (IdempotencyConflict, NoCapacity, Congested):
                # After any other error the job may be there all the same, and need its inputs.
                await self._drop(inputs)
                raise
            sending.accepted(submitted)
            if submitted.created:
                telemetry.JOBS_SUBMITTED.labels(order.front_end).inc()
                prompt = {"prompt": checked.request.prompt} if self._settings.log_prompts else {}
                log.info("job_created", account=order.account, front_end=order.front_end, pool=submitted.pool, **prompt)
            else:
                await self._drop(inputs)
        return submitted

    async def _spec(
        self, order: Order, checked: CheckedRequest, job_id: str, inputs: str | None, trace: dict[str, str]
    ) -> JobSpec:
        seed = checked.request.seed
        return JobSpec(
            id=job_id,
            account=order.account,
            parameters=checked.parameters,
            options=checked.options,
            seed=draw_seed() if seed is None else seed,
            fingerprint=checked.fingerprint(),
            warnings=checked.warnings,
            inputs=inputs,
            trace=trace,
        )

    def _lifetime(self, order: Order, checked: CheckedRequest) -> Lifetime:
        settings = self._settings
        asked = [limit for limit in (order.deadline, checked.options.deadline_seconds) if limit is not None]
        return Lifetime(
            min([settings.max_job_age, *asked]),
            settings.job_retention,
            longest=settings.max_job_age + settings.max_defer,
            asked_for=bool(asked),
        )

    def _join(self, order: Order, fingerprint: str) -> Join | None:
        if order.idempotency_key is not None:
            key = hashlib.sha256(order.idempotency_key.encode()).hexdigest()
            ttl = milliseconds(self._settings.idempotency_retention)
            return Join(f"key:{order.account}:{key}", "idempotency", ttl)
        if order.retry is not None:
            ttl = milliseconds(self._settings.sync_timeout + self._settings.retry_grace)
            return Join(f"call:{order.account}:{fingerprint}", "retry" if order.retry else "first", ttl)
        return None

    async def _store_inputs(self, job_id: str, checked: CheckedRequest, lifetime: Lifetime) -> str | None:
        if checked.inputs is None:
            return None
        key = f"{INPUT_BLOB}{job_id}"
        expires_at = self._inputs_expiry(lifetime, checked.options.not_before)
        data = msgspec.msgpack.encode(checked.inputs)
        storing = asyncio.create_task(self._blobs.put(key, data, expires_at), name=f"store-{job_id}")
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            # What is on its way cannot be called back, only deleted once it is there.
            await asyncio.gather(storing, return_exceptions=True)
            await self._drop(key)
            raise
        return key

    def _inputs_expiry(self, lifetime: Lifetime, start: datetime | None = None) -> int:
        """When an input that nobody deletes may go (ms): some time after its job must have ended."""
        seconds = lifetime.seconds + self._settings.input_retention + INPUT_MARGIN
        return milliseconds(max(time.time(), 0 if start is None else start.timestamp()) + seconds)

    async def _drop(self, inputs: str | None) -> None:
        """Delete a blob that no job needs, if that is possible; its own expiry does so otherwise."""
        if inputs is not None:
            try:
                await self._blobs.delete(inputs)
            except Img2ImgError as exc:
                log.warning("input_not_dropped", blob=inputs, error=str(exc))

    async def _take_back(self, job_ids: Sequence[str]) -> None:
        """Cancel as many of the jobs of a refused batch as possible."""
        for job_id in job_ids:
            try:
                await self._queue.cancel(job_id, StopReason.DISCONNECT)
            except JobNotFound:
                continue  # the one that was refused, and with it the batch
            except Img2ImgError as exc:
                log.warning("job_not_taken_back", job=job_id, error=str(exc))
