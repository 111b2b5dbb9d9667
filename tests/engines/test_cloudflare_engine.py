"""The engine that calls Cloudflare's API, against the stand-in: when it calls, how often, what it tells."""

import asyncio
import socket
import time

import pytest
from arq.connections import ArqRedis
from PIL import Image as PillowImage
from structlog.testing import capture_logs
from upstream_helpers import (
    ACME,
    OTHER,
    REFUSED_TOKEN,
    TOKENS,
    called,
    ended,
    failure_of,
    opened,
    outputs_of,
    task_of,
    words,
)

from img2img.errors import (
    JobError,
    ModelRefused,
    UnsafeOutput,
    UpstreamBusy,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamUnknown,
)
from img2img.jobs import Stage
from img2img.requests import Sampler
from tests.days import PATIENCE, keep_within_a_day
from tests.stack import DOG
from tests.upstream.api import MODEL, Api
from tests.upstream.server import Upstream
from worker.engines.base import Answered, Image, Notice, Output, Pictures, Progress, Sent
from worker.engines.cloudflare import CloudflareEngine


def notes_of(outputs: list[Output]) -> list[str]:
    return [output.message for output in outputs if isinstance(output, Notice)]


async def test_a_picture_and_what_made_it(engine: CloudflareEngine, api: Api) -> None:
    outputs = await outputs_of(engine, task_of())
    image = outputs[-1]
    assert isinstance(image, Image)
    assert (image.picture.mode, image.picture.size) == ("RGB", (512, 320))
    assert image.receipt is not None
    assert (image.receipt.model, image.receipt.device, image.receipt.steps) == (MODEL, "Cloudflare Workers AI", 8)
    assert image.receipt.rows is None
    assert image.upstream is not None
    assert image.upstream.request_id == api.calls[0].request_id
    assert (image.upstream.account, image.upstream.neurons) == (ACME.label, 12.5)
    stages = [output.stage for output in outputs if isinstance(output, Progress)]
    assert stages == [Stage.UPSTREAM, Stage.DECODE_IMAGE]


async def test_the_call_asks_for_what_the_task_says(engine: CloudflareEngine, api: Api) -> None:
    """With a plain slash in the model's name, and the input picture in base64."""
    dog = PillowImage.open(DOG).convert("RGB")
    mask = PillowImage.new("L", dog.size, 255)
    image = (await outputs_of(engine, task_of(negative_prompt="blurry"), Pictures(dog, mask)))[-1]
    (call,) = api.calls
    assert call.path == f"/client/v4/accounts/acme/ai/run/{MODEL}"
    assert (call.image, call.mask, call.token) == ("image_b64", True, TOKENS["acme"])
    assert call.fields == {
        "prompt": "a lion",
        "negative_prompt": "blurry",
        "width": 512,
        "height": 320,
        "num_steps": 8,
        "strength": 0.5,
        "guidance": 7.5,
        "seed": 1,
    }
    assert isinstance(image, Image)
    assert image.receipt is not None
    assert image.receipt.steps == 4


async def test_nothing_is_sent_before_it_is_on_record(engine: CloudflareEngine, api: Api) -> None:
    """The engine makes the call when it is asked for what comes after ``Sent``."""
    outputs = engine.generate(task_of(), Pictures())
    async for output in outputs:
        if isinstance(output, Sent):
            assert output.on_lost == "retry"
            break
    assert api.calls == []
    assert isinstance([output async for output in outputs][-1], Image)
    assert len(api.calls) == 1


@pytest.mark.parametrize(("behaviour", "billed"), [("damaged", True), ("size:64", True), ("3030", False)])
async def test_an_answer_says_whether_its_call_was_billed(
    engine: CloudflareEngine, behaviour: str, billed: bool
) -> None:
    """As one is that was good but for its picture; an error costs nothing."""
    _, outputs = await failure_of(engine, task_of(behaviour))
    assert outputs[-1] == Answered(billed=billed)


async def test_each_call_is_on_record_and_each_answer_takes_it_back(engine: CloudflareEngine, api: Api) -> None:
    """But the one that brings the picture, which has to be stored yet."""
    outputs = await outputs_of(engine, task_of("3040=2"))
    assert words(outputs) == ["Sent", "Answered", "Sent", "Answered", "Sent", "Image"]
    assert [call.code for call in api.calls] == [3040, 3040, None]


@pytest.mark.parametrize(
    ("behaviour", "kind", "calls"),
    [
        ("3040", UpstreamBusy, 2),
        ("3007", UpstreamFailed, 2),
        ("html:502", UpstreamFailed, 2),
        ("reset", UpstreamFailed, 2),
        ("truncated", UpstreamFailed, 1),
        ("size:64", UpstreamFailed, 1),
        ("5006", ModelRefused, 1),
        ("3006", ModelRefused, 1),
        ("flagged", UnsafeOutput, 1),
        ("3042", UpstreamRefused, 1),
        ("3041", UpstreamRefused, 1),
        ("redirect", UpstreamRefused, 1),
        ("3036", UpstreamBusy, 1),
    ],
)
async def test_what_becomes_of_a_job_and_how_often_it_calls(
    valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis, behaviour: str, kind: type[JobError], calls: int
) -> None:
    """Another call is made only where it may help, and no more than the setting says."""
    keep_within_a_day(PATIENCE)
    async with opened(valkey_url, upstream.url, max_calls=2) as engine:
        error, _ = await failure_of(engine, task_of(behaviour))
    assert type(error) is kind
    assert len(api.calls) == calls


async def test_a_refusal_has_the_upstreams_words_and_its_name_for_the_call(engine: CloudflareEngine, api: Api) -> None:
    error, _ = await failure_of(engine, task_of("5006"))
    assert str(error) == (
        "The upstream does not take this input (Bad input: Error: '/num_steps' must be <= 20; "
        f"request {api.calls[0].request_id}): change what it names"
    )


@pytest.mark.parametrize(
    ("change", "option"), [({"reproducible": True}, "reproducible"), ({"previews": True}, "previews")]
)
async def test_what_no_call_can_ask_for_is_refused(
    engine: CloudflareEngine, api: Api, change: dict[str, bool], option: str
) -> None:
    error, outputs = await failure_of(engine, task_of(**change))
    assert type(error) is ModelRefused
    assert str(error).startswith(f"options.{option}: ")
    assert str(error).endswith("leave the option out")
    assert outputs == []
    assert api.calls == []


async def test_a_sampler_that_cannot_be_chosen_is_noted(engine: CloudflareEngine) -> None:
    outputs = await outputs_of(engine, task_of(sampler=Sampler.EULER))
    assert notes_of(outputs) == ["options.sampler was ignored: the upstream has a sampler of its own"]


@pytest.mark.parametrize(
    ("seed", "sent", "notes"),
    [
        (2**53 - 1, 2**53 - 1, []),
        (2**53, 0, ["seed 9007199254740992 was sent as 0, modulo 2^53: larger ones may be rounded on their way"]),
        (
            2**64 - 1,
            2**53 - 1,
            [
                "seed 18446744073709551615 was sent as 9007199254740991, modulo 2^53: "
                "larger ones may be rounded on their way"
            ],
        ),
    ],
)
async def test_a_seed_that_json_may_not_carry_is_reduced_and_noted(
    engine: CloudflareEngine, api: Api, seed: int, sent: int, notes: list[str]
) -> None:
    """The job keeps its seed, and says which one the call had."""
    outputs = await outputs_of(engine, task_of(seed=seed))
    assert api.calls[0].fields["seed"] == sent
    assert notes_of(outputs) == notes


class TestLostAnswers:
    async def test_with_retry_it_calls_again(self, engine: CloudflareEngine, api: Api) -> None:
        """What may have been billed stays on record until an answer comes."""
        outputs = await outputs_of(engine, task_of("reset=1"))
        assert words(outputs) == ["Sent", "Sent", "Image"]
        assert len(api.calls) == 2

    @pytest.mark.parametrize("behaviour", ["reset", "close", "cut", "reset-body"])
    async def test_with_fail_it_calls_once(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis, behaviour: str
    ) -> None:
        async with opened(valkey_url, upstream.url, on_lost="fail") as engine:
            error, outputs = await failure_of(engine, task_of(behaviour))
        assert type(error) is UpstreamUnknown
        assert "may have been billed: replay the job" in str(error)
        assert words(outputs) == ["Sent"]
        assert len(api.calls) == 1

    async def test_a_call_that_was_never_sent_is_not_lost(self, valkey_url: str, redis: ArqRedis) -> None:
        """Nobody listens there: another call costs nothing."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}/client/v4"
        async with opened(valkey_url, url, on_lost="fail", max_calls=2) as engine:
            error, outputs = await failure_of(engine, task_of())
        assert type(error) is UpstreamFailed
        assert words(outputs) == ["Sent", "Answered", "Sent", "Answered"]


class TestStopping:
    async def test_a_call_that_is_given_up_is_hung_up_at_once(self, engine: CloudflareEngine, api: Api) -> None:
        working = asyncio.create_task(outputs_of(engine, task_of("never")))
        await called(api, 1)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await ended(api.calls[0], "gone")
        assert isinstance((await outputs_of(engine, task_of()))[-1], Image)

    async def test_a_call_may_be_given_up_at_any_moment(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        """Just as its connection is made, too: the only place that there is for calls is free again each time."""
        async with opened(valkey_url, upstream.url, highest=1) as engine:
            for moment in range(30):
                outputs = engine.generate(task_of("never"), Pictures())
                async for output in outputs:
                    if isinstance(output, Sent):
                        break
                calling = asyncio.ensure_future(anext(outputs))
                for _ in range(moment):
                    await asyncio.sleep(0)
                calling.cancel()
                await asyncio.wait({calling})
                await outputs.aclose()
            async with asyncio.timeout(60):
                assert isinstance((await outputs_of(engine, task_of()))[-1], Image)

    async def test_the_generator_may_be_closed_before_its_call_and_twice(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        """Its place is free again."""
        async with opened(valkey_url, upstream.url, highest=1) as engine:
            outputs = engine.generate(task_of(), Pictures())
            async for output in outputs:
                if isinstance(output, Sent):
                    break
            for _ in range(2):
                await outputs.aclose()
            assert isinstance((await outputs_of(engine, task_of()))[-1], Image)

    async def test_an_interrupt_ends_a_wait(self, engine: CloudflareEngine, api: Api, redis: ArqRedis) -> None:
        """Without a picture and without a call; a call under way goes on."""
        interrupt = asyncio.Event()
        interrupt.set()
        outputs = [output async for output in engine.generate(task_of(), Pictures(), interrupt=interrupt)]
        assert words(outputs) == []
        assert api.calls == []
        interrupt.clear()
        outputs = []
        async for output in engine.generate(task_of(), Pictures(), interrupt=interrupt):
            outputs.append(output)
            if isinstance(output, Sent):
                interrupt.set()
        assert words(outputs) == ["Sent", "Image"]

    async def test_a_deadline_is_kept_by_whoever_runs_the_job(
        self, valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis
    ) -> None:
        """Neither a call nor a wait for one ends by itself then: which end the job has would be a matter of chance."""
        deadline = time.monotonic() + 3.0
        async with opened(valkey_url, upstream.url, highest=1, on_lost="fail") as engine:
            calling = asyncio.create_task(outputs_of(engine, task_of("never", deadline=deadline)))
            await called(api, 1)
            waiting = asyncio.create_task(outputs_of(engine, task_of(deadline=deadline)))
            await asyncio.wait({calling, waiting}, timeout=deadline + 0.5 - time.monotonic())
            assert not calling.done()
            assert not waiting.done()
            calling.cancel()
            waiting.cancel()
            await asyncio.wait({calling, waiting})


async def test_no_token_is_in_a_log_or_an_error(valkey_url: str, upstream: Upstream, api: Api, redis: ArqRedis) -> None:
    with capture_logs() as logs:
        async with opened(valkey_url, upstream.url, REFUSED_TOKEN, OTHER, max_calls=2) as engine:
            told = [await failure_of(engine, task_of(behaviour)) for behaviour in ("10000", "reset", "5006", "no-http")]
    shown = f"{logs} {[(str(error), repr(error), repr(error.__cause__)) for error, _ in told]}"
    assert "upstream_call" in shown
    assert "wrong-token" not in shown
    assert TOKENS["other"] not in shown


async def test_it_says_what_it_is(engine: CloudflareEngine) -> None:
    info = engine.info
    assert (info.name, info.model, info.device, info.native_size) == ("cloudflare", MODEL, "api", (512, 512))
