"""From the body of a request to sequences for the engine."""

import asyncio
import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Optional, TypeVar, Union

from fastapi import Request

from litgpt.errors import UserError, nearest
from litgpt.generate.answers import TextStream
from litgpt.generate.engine import Engine
from litgpt.generate.engine import Request as Sequence
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.serve.failure import Failure
from litgpt.serve.guard import SMALL
from litgpt.serve.metrics import Metrics
from litgpt.serve.models import ModelRegistry
from litgpt.serve.schema import Chat, SamplingParams, parse
from litgpt.serve.settings import Settings
from litgpt.serve.worker import Generation, Worker, timed_out
from litgpt.text.tokenizer import TooLong

T = TypeVar("T")
N_SMALL, N_LARGE = 2, 1  # bodies that are parsed at once


class Lanes:
    """A queue for small bodies and one for large ones. Belongs to the event loop.

    Parsing takes many times the memory of a body; one large body at a time bounds it.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(N_SMALL + N_LARGE, "reader")
        self.small, self.large = asyncio.Semaphore(N_SMALL), asyncio.Semaphore(N_LARGE)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Run `work`, for a body of `size` bytes, in a thread and return its result. A caller that is cancelled while
        it waits leaves the queue; work that has begun is finished, and keeps its place until then."""
        lane = self.large if size > SMALL else self.small
        await lane.acquire()
        try:
            future = asyncio.get_running_loop().run_in_executor(self.pool, call, work, size > SMALL)
        except BaseException:
            lane.release()
            raise
        future.add_done_callback(lambda _: lane.release())
        result = await asyncio.shield(future)
        if isinstance(result, Failure):
            raise result
        return result

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


class Service:
    """What the routes share: the models, the engine, and the threads that parse requests."""

    def __init__(self, registry: ModelRegistry, settings: Settings) -> None:
        self.registry, self.settings = registry, settings
        self.metrics, self.lanes = Metrics(), Lanes()
        engine = Engine(registry.models[registry.default].model, settings.max_batch, adapters=registry.adapters)
        self.worker = Worker(engine, settings.max_sequences, self.metrics.count)

    def find(self, name: Optional[str]) -> tuple[str, InferenceModel]:
        """The model that a request names. Raises `Failure` if there is none."""
        registry = self.registry
        found = registry.default if name is None else registry.find(name)
        if found is None:
            hint = nearest(str(name), registry.models)
            message = f"Unknown model {str(name)[:80]!r}.{hint} Available: {', '.join(registry.models)}."
            raise Failure(404, message, "model", "model_not_found")
        return found, registry.models[found]

    async def start(self, schema: type[SamplingParams], request: Request) -> Generation:
        """Parse a request and start to answer it. Raises `Failure` if it cannot be parsed in time, or too many wait."""
        began, body = asyncio.get_running_loop().time(), (await request.receive())["body"]
        content_type = request.headers.get("content-type", "")
        parsing = self.lanes.run(len(body), partial(self.parse, schema, body, content_type, began))
        del body  # otherwise it would stay in memory while others are parsed
        try:
            generation = await asyncio.wait_for(parsing, self.settings.timeout)
        except asyncio.TimeoutError:
            raise timed_out(self.settings.timeout) from None
        self.worker.submit(generation)
        return generation

    def parse(self, schema: type[SamplingParams], content: bytes, content_type: str, began: float) -> Generation:
        """What a body asks for; runs in a thread. Raises `Failure` if it cannot be answered."""
        body = parse(schema, content, content_type)
        name, model = self.find(body.model)
        if body.n_prompts * body.n > self.settings.max_sequences:
            limit = f"this server handles at most {self.settings.max_sequences} at once"
            raise Failure(400, f"The request asks for {body.n_prompts * body.n} answers; {limit}.", "n")
        try:
            sequences = self.sequences(body, name, model)
        except UserError as e:
            code = "context_length_exceeded" if isinstance(e, TooLong) else None
            raise Failure(400, str(e), "messages" if isinstance(body, Chat) else "prompt", code) from e
        except RecursionError as e:
            raise Failure(400, "The body is nested too deeply.") from e
        return Generation(
            model=name,
            tokenizer=model.tokenizer,
            sequences=sequences,
            streams=[TextStream(model.tokenizer, sequence.prompt, body.stop) for sequence in sequences],
            n_prompt=sum(len(sequence.prompt) for sequence in sequences[:: body.n]),
            n=body.n,
            stream=body.stream,
            include_usage=body.stream_options.include_usage,
            logprobs=body.n_logprobs is not None,
            began=began,
            timeout=self.settings.timeout,
        )

    def sequences(self, body: SamplingParams, name: str, model: InferenceModel) -> list[Sequence]:
        """`n` sequences for each prompt. Raises `UserError` if the model cannot read them."""
        config = model.model.config
        length = body.max_length or self.settings.max_new_tokens
        n_logprobs = None if body.n_logprobs is None else min(body.n_logprobs, config.padded_vocab_size)
        seed = random.getrandbits(48) if body.seed is None else body.seed
        sampling, stop_ids = self.sampling(body), model.stop_ids
        sequences = [
            Sequence(
                prompt,
                length,
                sampling=sampling,
                stop_ids=stop_ids,
                seed=seed + i,
                logprobs=n_logprobs,
                adapter=self.registry.adapter(name),
            )
            for prompt in body.token_ids(model)
            for i in range(body.n)
        ]
        for sequence in sequences:
            sequence.check(model.model)
        return sequences

    def sampling(self, body: SamplingParams) -> Sampling:
        defaults = self.settings.sampling
        return Sampling(
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_k=body.top_k if "top_k" in body.model_fields_set else defaults.top_k,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
        )


def call(work: Callable[[], T], large: bool) -> Union[T, Failure]:
    """Return a failure instead of raising it, without its traceback, whose frames hold the body.

    For a large body, the garbage collector would scan millions of new objects, and block all threads meanwhile.
    """
    if large:
        gc.disable()
    try:
        return work()
    except Failure as e:
        e.__cause__ = e.__context__ = None
        return e.with_traceback(None)
    finally:
        if large:
            gc.enable()
