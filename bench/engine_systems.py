"""The systems that bench/engine.py compares, each in a process of its own.

    python -m bench.engine_systems SYSTEM DEVICE MODEL [MAX_ROWS]

One JSON line on stdin is a command, one on stdout its answer; the first answer says that the system is warm, or why it
cannot be had here.
"""

import asyncio
import random
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, Self

import msgspec
import torch
import torch.fx.experimental._config
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image as PillowImage

from bench.engine_trace import Arrival, Job
from img2img.jobs import Stage
from worker.engines.base import Image, Pictures, Progress, Task
from worker.engines.diffusion import DiffusionEngine
from worker.engines.diffusion.engine import EngineOptions
from worker.engines.diffusion.loading import BUNDLED

SAMPLE: Final = Path(__file__).parents[1] / "examples" / "dog.png"
LARGEST_BATCH: Final = 8
"""Pictures in one call of a pipeline."""
COMPILED_SHAPES: Final = 64


class Done(msgspec.Struct, frozen=True):
    """The picture of ``job``, and when it was there: seconds after the run's beginning."""

    at: float
    job: Job
    picture: PillowImage.Image


class System(Protocol):
    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def serve(self, arrivals: Sequence[Arrival]) -> list[Done]:
        """Make each picture, once it has arrived."""
        ...

    async def cancel(self, jobs: Sequence[Job], count: int) -> list[float]:
        """Stop ``count`` jobs in the midst of their steps, beside others: the seconds that each took to stop."""
        ...


class Pipelines:
    """diffusers' own pipelines, first come first served: what waits with equal parameters shares a call, up to
    ``largest`` pictures."""

    def __init__(self, model: str, device: str, largest: int = 1, compiled: bool = False) -> None:
        is_cuda = device == "cuda"
        folder = BUNDLED / model if (BUNDLED / model).is_dir() else Path(model)
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            safety_checker=None,
            local_files_only=True,
            low_cpu_mem_usage=False,
            dtype=torch.float16 if is_cuda else torch.float32,
        ).to(device)
        # The sampler that the engine has by default.
        config = {**pipeline.scheduler.config, "clip_sample": False}
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"
        )
        if is_cuda:
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        if compiled:
            compile_unet(pipeline.unet, is_cuda)
        self._from_prompt = pipeline
        self._from_picture = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
        for one in (self._from_prompt, self._from_picture):
            one.set_progress_bar_config(disable=True)
        self._largest = largest

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def serve(self, arrivals: Sequence[Arrival]) -> list[Done]:
        waiting, done = list(arrivals), []
        began = time.perf_counter()
        while waiting:
            await asyncio.sleep(max(0.0, waiting[0].at - (time.perf_counter() - began)))
            jobs = self._take(waiting, time.perf_counter() - began)
            pictures = self._call(jobs)
            now = time.perf_counter() - began
            done += [Done(now, job, picture) for job, picture in zip(jobs, pictures, strict=True)]
        return done

    async def cancel(self, jobs: Sequence[Job], count: int) -> list[float]:
        raise NotImplementedError("A pipeline's call cannot be stopped from outside")

    def _take(self, waiting: list[Arrival], now: float) -> list[Job]:
        """The first that waits, with those like it that are there by ``now``."""
        first = waiting[0]
        alike = [one for one in waiting if one.at <= now and one.job.call == first.job.call]
        taken = [first, *(one for one in alike if one is not first)][: self._largest]
        for one in taken:
            waiting.remove(one)
        return [one.job for one in taken]

    def _call(self, jobs: list[Job]) -> list[PillowImage.Image]:
        first = jobs[0]
        width, height = first.size
        shared: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            "num_inference_steps": first.num_steps,
            "guidance_scale": first.guidance,
            "generator": [torch.Generator().manual_seed(job.seed) for job in jobs],
        }
        if first.from_picture:
            pictures = [sample(first.size)] * len(jobs)
            made = self._from_picture(image=pictures, strength=first.strength, **shared)
        else:
            made = self._from_prompt(width=width, height=height, **shared)
        images: list[PillowImage.Image] = made.images
        return images


def compile_unet(unet: Any, is_cuda: bool) -> None:
    """Compile what it computes, once for as many shapes as can be: on a CPU each takes minutes."""
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    torch.fx.experimental._config.use_duck_shape = False
    layout = torch.channels_last if is_cuda else torch.contiguous_format
    # Latents come in the layout of whatever made them, and each layout would be compiled for itself.
    unet.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(memory_format=layout), *inputs[1:]))
    how: dict[str, Any] = {"mode": "reduce-overhead"} if is_cuda else {"dynamic": True}
    unet.forward = torch.compile(unet.forward, **how)


class Ours:
    """``DiffusionEngine``, given as many jobs at once as it has slots for, as a worker does."""

    def __init__(self, model: str, device: str, max_rows: int) -> None:
        self._engine = DiffusionEngine(model, device, EngineOptions(max_rows=max_rows))

    async def __aenter__(self) -> Self:
        await self._engine.__aenter__()
        self._slots = self._engine.slots(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._engine.__aexit__(None, None, None)

    async def serve(self, arrivals: Sequence[Arrival]) -> list[Done]:
        free, began = asyncio.Semaphore(self._slots), time.perf_counter()

        async def one(arrival: Arrival) -> Done:
            await asyncio.sleep(max(0.0, arrival.at - (time.perf_counter() - began)))
            async with free:
                picture = await self._make(arrival.job)
            return Done(time.perf_counter() - began, arrival.job, picture)

        return list(await asyncio.gather(*(one(arrival) for arrival in arrivals)))

    async def cancel(self, jobs: Sequence[Job], count: int) -> list[float]:
        """Each is stopped at a random moment of a random step; all other slots are busy."""
        others = [asyncio.create_task(self._keep_busy(jobs[number:])) for number in range(max(self._slots - 1, 1))]
        draw = random.Random(0)
        took = [await self._stop_one(jobs[number % len(jobs)], draw) for number in range(count)]
        for other in others:
            if other.done():
                other.result()  # what it failed of: it kept nothing busy
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return took

    async def _keep_busy(self, jobs: Sequence[Job]) -> None:
        while True:
            for job in jobs:
                await self._make(job)

    async def _stop_one(self, job: Job, draw: random.Random) -> float:
        job = msgspec.structs.replace(job, num_steps=20, strength=1.0)
        last = draw.randrange(2, 10)
        steps: list[float] = []
        async with aclosing(self._engine.generate(*inputs(job))) as outputs:
            async for output in outputs:
                if isinstance(output, Progress) and output.stage is Stage.STEPS:
                    steps.append(time.perf_counter())
                    if output.step == last:
                        break
            await asyncio.sleep(draw.random() * (steps[-1] - steps[-2]))
            began = time.perf_counter()
            await outputs.aclose()
            return time.perf_counter() - began

    async def _make(self, job: Job) -> PillowImage.Image:
        async with aclosing(self._engine.generate(*inputs(job))) as outputs:
            async for output in outputs:
                if isinstance(output, Image):
                    return output.picture
        raise RuntimeError("The engine ended without a picture")


@cache
def sample(size: tuple[int, int]) -> PillowImage.Image:
    return PillowImage.open(SAMPLE).convert("RGB").resize(size, PillowImage.Resampling.LANCZOS)


def inputs(job: Job) -> tuple[Task, Pictures]:
    width, height = job.size
    task = Task(job.prompt, "", width, height, job.num_steps, job.strength, job.guidance, job.seed)
    return task, Pictures(sample(job.size) if job.from_picture else None)


class Command(msgspec.Struct, frozen=True):
    """``serve`` arrivals (and keep the pictures in ``folder``), ``cancel`` so many of the arrivals' jobs, or tell the
    peak ``memory``."""

    do: str
    arrivals: list[Arrival] = []
    count: int = 0
    folder: str | None = None


async def answer(system: System, command: Command) -> dict[str, Any]:
    if command.do == "memory":
        return {"mib": peak_memory()}
    if command.do == "cancel":
        return {"seconds": await system.cancel([one.job for one in command.arrivals], command.count)}
    before = core_seconds()
    done = await system.serve(command.arrivals)
    cores = core_seconds() - before
    if command.folder is not None:
        for one in done:
            one.picture.save(Path(command.folder) / f"{one.job.seed}.png")
    arrived = {one.job.seed: one.at for one in command.arrivals}
    latencies = [one.at - arrived[one.job.seed] for one in done]
    return {"seconds": max(one.at for one in done), "core_seconds": cores, "latencies": latencies}


def core_seconds() -> float:
    """What this process has used of the machine's cores."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_memory() -> float:
    """MiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def make_system(name: str, model: str, device: str, max_rows: int) -> System:
    match name:
        case "ours":
            return Ours(model, device, max_rows)
        case "batches":
            return Pipelines(model, device, largest=LARGEST_BATCH)
        case "compiled":
            return Pipelines(model, device, compiled=True)
        case _:
            return Pipelines(model, device)


async def warm_up(system: System, arrivals: list[Arrival]) -> str | None:
    """Make short jobs of every kind; answers why that cannot be (torch.compile lacks its compiler)."""
    try:
        await system.serve(arrivals)
    except torch._dynamo.exc.TorchDynamoException as exc:
        return str(exc).partition("\n")[0]
    return None


async def main() -> None:
    name, device, model, max_rows = sys.argv[1:]
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder(Command)
    async with make_system(name, model, device, int(max_rows)) as system:
        for number, line in enumerate(sys.stdin.buffer):
            command = decoder.decode(line)
            if number == 0:
                told: dict[str, Any] = {"missing": await warm_up(system, command.arrivals)}
            else:
                told = await answer(system, command)
            answers.write(encoder.encode(told) + b"\n")
            answers.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
