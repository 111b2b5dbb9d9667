"""One job upstream: call after call, until there is a picture or a reason why there will be none.

This is the only place that calls again. Before each call comes ``Sent``, so that what may have been billed is on
record before it is; ``Answered`` takes that back when the answer brought no picture.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec
import structlog

from img2img import telemetry
from img2img.errors import (
    ModelRefused,
    Unavailable,
    UnsafeOutput,
    UpstreamBusy,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamUnknown,
)
from img2img.jobs import OnLost, Stage
from img2img.schema import MODEL
from img2img.upstream import Credential, Pause, UpstreamLedger
from worker.engines.base import (
    Answered,
    Checkpoint,
    EngineInfo,
    Notice,
    Output,
    Pictures,
    Progress,
    Sent,
    Task,
)
from worker.engines.cloudflare.accounts import Account
from worker.engines.cloudflare.bodies import ImageForm, encode_body, sent_seed
from worker.engines.cloudflare.called import Called, finish, read_answer
from worker.engines.cloudflare.exchange import Exchange, NeverSent, NoAnswer
from worker.engines.cloudflare.gate import Gate, Signal, Turn
from worker.engines.cloudflare.outcomes import Action, Outcome, Verdict

NATIVE_SIZE: Final = (512, 512)
PATIENCE: Final = 30.0
"""Seconds for which a job waits in the worker for its turn; what takes longer is waited for in the queue, and while it
is known to take longer the engine has no slots."""
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 8.0
SPREAD: Final = 5.0
"""Jobs that wait for the same moment come back within so many seconds of it."""
GIVE_UP: Final = 300.0
"""Seconds after which a job makes no further call in this attempt, which has a time limit of its own."""
SIGNALS: Final = {
    Outcome.PICTURE: Signal.DONE,
    Outcome.CAPACITY: Signal.OVERLOADED,
    Outcome.TIMEOUT: Signal.FAILED,
    Outcome.ABORTED: Signal.FAILED,
    Outcome.FAILED: Signal.FAILED,
    Outcome.NO_PICTURE: Signal.FAILED,
    Outcome.UNREACHABLE: Signal.FAILED,
    Outcome.LOST: Signal.FAILED,
    Outcome.DENIED: Signal.FAILED,  # all jobs would fail, and this pool, always free, would draw all there are
    Outcome.NO_ROUTE: Signal.FAILED,
}
"""What outcomes say of the upstream, or of how we call it; the others are answers about one account or one call."""
WAITS: Final = {
    "parked": "Every upstream account has used up its daily allocation: wait until 00:00 UTC, or add an account",
    "held": "The upstream has asked for a pause, or let no account of ours in: wait, or check ids and tokens",
    "limited": "As many calls were made as the upstream takes in this time: wait, or add an account",
}
T = TypeVar("T")

log = structlog.get_logger(__name__)


class UpstreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to call: where, for how many jobs at once, how often for one, and what becomes of one whose answer is lost.

    ``breaker`` is the number of failed calls in a row after which none are made for a while.
    """

    url: str
    images: ImageForm = "base64"
    on_lost: OnLost = "retry"
    max_calls: int = 4
    lowest: int = 1
    highest: int = 64
    breaker: int = 5


class CloudflareEngine:
    """Makes pictures by calling Workers AI with one of ``accounts``; ``ledger`` is opened with the engine."""

    def __init__(
        self, accounts: Sequence[Account], options: UpstreamOptions, ledger: AbstractAsyncContextManager[UpstreamLedger]
    ) -> None:
        self._accounts = {account.credential: account for account in accounts}
        self._options = options
        self._unopened = ledger
        self._stack = AsyncExitStack()
        self._gate = Gate(options.lowest, options.highest, options.breaker)
        self._line = asyncio.Lock()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("cloudflare", MODEL, "api", NATIVE_SIZE)

    async def __aenter__(self) -> Self:
        self._ledger = await self._stack.enter_async_context(self._unopened)
        self._exchange = await self._stack.enter_async_context(Exchange(self._options.url))
        for outcome in Outcome:  # from 0, so that the first one is an increase
            telemetry.UPSTREAM_CALLS.labels(outcome.label)
        for account in self._accounts.values():
            log.info("upstream_account", account=account.id, shown_as=account.label)
        await self._learn_pause()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _learn_pause(self) -> None:
        """Hear what other workers know already, so that no job is claimed only to be given back."""
        try:
            self._close_for(await self._ledger.pause(tuple(self._accounts)))
        except Unavailable as exc:  # the first job will tell
            log.warning("upstream_limits_unavailable", error=str(exc))

    def _close_for(self, pause: Pause | None) -> None:
        if pause is not None and pause.seconds > PATIENCE:
            log.warning("upstream_paused", why=pause.why, seconds=round(pause.seconds))
            self._gate.close(pause.seconds)

    def slots(self, setting: int) -> int:
        """As many as the upstream takes calls now, and a few that are ready; at most ``setting``, if that is given."""
        slots = self._gate.slots
        return min(slots, setting) if setting else slots

    async def slots_changed(self, told: int) -> None:
        """An answer came, or the time has passed for which no call could be made."""
        await self._gate.slots_changed(told)

    async def broken(self) -> None:
        """It never is: an upstream that fails comes back."""
        await asyncio.Event().wait()

    async def generate(
        self,
        task: Task,
        pictures: Pictures,
        resume: Checkpoint | None = None,
        interrupt: asyncio.Event | None = None,
    ) -> AsyncGenerator[Output]:
        """Yield ``Sent`` before each call, ``Answered`` after one without a picture; see ``Engine.generate``.

        Raises:
            UpstreamBusy: no call may be made for longer than a job waits here.
            UpstreamRefused: no account may make this call.
            UpstreamUnknown: an answer was lost, and the call is not to be made again.
            UnsafeOutput: the upstream flagged the picture.
        """
        _check(task)
        yield Progress(Stage.UPSTREAM)
        for notice in _notices(task):
            yield notice
        body = await _encoded(task, pictures, self._options.images)
        tries = Tries(self._accounts, self._options, task.deadline)
        while True:
            with self._gate.turn() as turn:
                account = await _unless(interrupt, self._admitted(turn, tries))
                if account is None:
                    return
                yield Sent(self._options.on_lost)
                called = await self._call(turn, account, body, task)
            if called.picture is not None:
                yield Progress(Stage.DECODE_IMAGE)
                yield await asyncio.to_thread(finish, called, called.picture, account, task, pictures)
                return
            if called.verdict.outcome is not Outcome.LOST:
                yield Answered(billed=called.was_billed)
            if await _unless(interrupt, asyncio.sleep(tries.pause_after(called, account), True)) is None:
                return
            yield Progress(Stage.UPSTREAM)

    async def _admitted(self, turn: Turn, tries: "Tries") -> Account:
        """Wait in line for a turn, and for an account that may make one more call.

        Raises:
            UpstreamBusy: that takes longer than a job waits here.
        """
        began = time.monotonic()
        patience = min(PATIENCE, tries.gives_up_at - began)
        try:
            # One at a time: whoever is first in line asks, so that all get their turns in the order in which they came.
            async with asyncio.timeout(patience), self._line:
                await turn.take()
                return self._accounts[await self._credential(tries, min(began + patience, tries.ends))]
        except TimeoutError as exc:
            breaker = self._gate.breaker
            why = "fails call after call" if breaker.is_open else "takes no more calls for the moment"
            pause = breaker.pause()
            raise UpstreamBusy(
                f"The upstream {why}: wait", _spread(pause if pause < LONGEST_PAUSE else LONGEST_PAUSE)
            ) from exc

    async def _credential(self, tries: "Tries", ends: float) -> Credential:
        while True:
            try:
                answer = await self._ledger.admit(tuple(tries.accounts))
            except Unavailable as exc:
                log.warning("upstream_limits_unavailable", error=str(exc))
                await asyncio.sleep(_jittered(FIRST_PAUSE))
                continue
            if not isinstance(answer, Pause):
                return answer
            if len(tries.accounts) == len(self._accounts):
                self._close_for(answer)
            if time.monotonic() + answer.seconds > ends:
                raise UpstreamBusy(WAITS[answer.why], _spread(answer.seconds))
            await asyncio.sleep(answer.seconds)

    async def _call(self, turn: Turn, account: Account, body: bytes, task: Task) -> Called:
        """Make one call, and note what became of it: for the gate, in the books, in the log."""
        turn.begin()
        began = time.perf_counter()
        try:
            answer = await self._exchange.call(account, body, max(task.deadline - time.monotonic(), 0.0))
            called = await read_answer(answer, (task.width, task.height))
        except NeverSent as exc:
            called = Called(Verdict(Outcome.UNREACHABLE, str(exc)))
        except NoAnswer as exc:
            called = Called(Verdict(Outcome.LOST, str(exc)))
        outcome = called.verdict.outcome
        late = time.monotonic() >= task.deadline  # then it was not the upstream that let us down
        signal = Signal.GIVEN_UP if late else SIGNALS.get(outcome, Signal.ANSWERED)
        turn.ended(signal, task.num_steps * task.width * task.height / (NATIVE_SIZE[0] * NATIVE_SIZE[1]))
        telemetry.UPSTREAM_CALLS.labels(outcome.label).inc()
        telemetry.observe(telemetry.UPSTREAM_SECONDS.labels(outcome.label), time.perf_counter() - began)
        if outcome is not Outcome.PICTURE:
            log.warning(
                "upstream_call",
                outcome=outcome.label,
                account=account.id,
                request=called.request_id,
                # What it says of an input may quote the prompt.
                words="" if outcome.action in (Action.REFUSE, Action.CENSOR) else called.verdict.words,
            )
        await self._settle(account, called)
        return called

    async def _settle(self, account: Account, called: Called) -> None:
        parked = called.verdict.outcome is Outcome.DAY_USED_UP
        pictures = int(called.picture is not None)
        if not (parked or pictures or called.neurons or called.held):
            return
        try:
            await self._ledger.settle(
                account.credential,
                pictures=pictures,
                neurons=called.neurons or 0.0,
                held=called.held,
                parked=parked,
            )
        except Unavailable as exc:  # the answer is worth more than the books
            log.warning("upstream_not_noted", account=account.id, error=str(exc))


class Tries:
    """What is left to one job of its calls: ``accounts`` that may make them, until ``ends`` (monotonic clock).

    What would be later than the job's deadline is not begun. The deadline itself is kept by whoever runs the job: a
    wait or a call that ended here at that moment, too, would give the job another end, by chance.
    """

    def __init__(self, accounts: Iterable[Credential], options: UpstreamOptions, deadline: float) -> None:
        self.accounts = dict.fromkeys(accounts)
        self.gives_up_at = time.monotonic() + GIVE_UP
        self.ends = min(deadline, self.gives_up_at)
        self._options = options
        self._calls = 0

    def pause_after(self, called: Called, account: Account) -> float:
        """Seconds to wait before the next call.

        Raises:
            JobError: there is none: the kind says what becomes of the job.
        """
        self._calls += 1
        outcome, words = called.verdict.outcome, called.told
        match outcome.action:
            case Action.CENSOR:
                raise UnsafeOutput(
                    f"The upstream flagged the picture{words}: change the prompt, the picture or the seed"
                )
            case Action.REFUSE:
                raise ModelRefused(f"The upstream does not take this input{words}: change what it names")
            case Action.STOP:
                raise UpstreamRefused(f"The upstream takes no such call{words}: check IMG2IMG_UPSTREAM_URL")
            case Action.FAIL:
                raise UpstreamFailed(f"The upstream answered without a picture{words}: try again")
            case Action.SWITCH:
                del self.accounts[account.credential]
                if not self.accounts:
                    raise UpstreamRefused(f"The upstream lets no account of ours call it{words}: check ids and tokens")
                return 0.0
        if outcome is Outcome.LOST and self._options.on_lost == "fail":
            raise UpstreamUnknown(
                f"A call upstream was sent and its answer lost{words}, so that it may have been billed: "
                "replay the job to run it again"
            )
        return self._pause(called, words)

    def _pause(self, called: Called, words: str) -> float:
        outcome = called.verdict.outcome
        backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._calls - 1))
        # A used-up account has been parked, a held one is left alone: others may go at once.
        pause = 0.0 if outcome is Outcome.DAY_USED_UP or called.held else max(_jittered(backoff), called.pause)
        is_last = self._calls >= self._options.max_calls or time.monotonic() + pause >= self.ends
        if pause > PATIENCE or (is_last and outcome.action is Action.WAIT):
            raise UpstreamBusy(f"The upstream takes no call now{words}: wait", _spread(max(pause, LONGEST_PAUSE)))
        if is_last:
            raise UpstreamFailed(f"The upstream failed{words}, at {self._calls} calls: try again")
        return pause


def _check(task: Task) -> None:
    """Refuse what no call can ask for.

    Raises:
        ModelRefused: names the option.
    """
    if task.reproducible:
        raise ModelRefused("options.reproducible: the upstream promises no picture again: leave the option out")
    if task.previews:
        raise ModelRefused("options.previews: the upstream shows nothing before the end: leave the option out")


def _notices(task: Task) -> Iterator[Notice]:
    """Where the call differs from what was asked for."""
    if task.sampler is not None:
        yield Notice("options.sampler was ignored: the upstream has a sampler of its own")
    if (seed := sent_seed(task.seed)) != task.seed:
        yield Notice(f"seed {task.seed} was sent as {seed}, modulo 2^53: larger ones may be rounded on their way")


async def _encoded(task: Task, pictures: Pictures, form: ImageForm) -> bytes:
    if pictures.image is None:
        return encode_body(task, pictures, form)
    return await asyncio.to_thread(encode_body, task, pictures, form)


def _jittered(seconds: float) -> float:
    return random.uniform(seconds / 2, seconds)  # noqa: S311 - no secret depends on it


def _spread(seconds: float) -> float:
    return seconds + random.uniform(0, SPREAD)  # noqa: S311


async def _unless(interrupt: asyncio.Event | None, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None when ``interrupt`` is set first: then it was cancelled, and has ended."""
    doing = asyncio.create_task(work, name="upstream-wait")
    told = asyncio.create_task((interrupt or asyncio.Event()).wait(), name="upstream-interrupt")
    try:
        await asyncio.wait({doing, told}, return_when=asyncio.FIRST_COMPLETED)
        return None if told.done() else doing.result()
    finally:
        told.cancel()
        doing.cancel()
        await asyncio.wait({doing})
        if not doing.cancelled():
            doing.exception()  # seen, whoever asks for it
