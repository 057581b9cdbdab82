"""vLLM as the engine: for GPUs, and the fastest with many clients. It batches continuously by itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from itertools import count
from typing import Any

from text import conversation
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from engine import Job, Options


class VllmEngine:
    """See :class:`engine.Engine`."""

    def __init__(self, options: Options) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(options.checkpoint))
        self._loop = asyncio.new_event_loop()
        self._numbers = count()
        self._closed = False
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        arguments = AsyncEngineArgs(
            model=str(options.checkpoint),
            dtype=options.dtype,
            max_model_len=options.context or None,
            max_num_seqs=options.max_batch,
            tensor_parallel_size=max(1, options.gpus),
            enforce_eager=options.gpus == 0,  # compiling for a CPU takes minutes and a C++ compiler
        )
        self._engine = self._wait(self._start(arguments))
        self.context = int(self._engine.model_config.max_model_len)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text).input_ids)

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        return conversation(self._tokenizer, messages)

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            asyncio.run_coroutine_threadsafe(self._run(job), self._loop)

    def close(self) -> None:
        self._closed = True
        self._engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _start(self, arguments: AsyncEngineArgs) -> Any:
        return AsyncLLM.from_engine_args(arguments)  # wants to be made inside its event loop

    async def _run(self, job: Job) -> None:
        try:
            reason = await self._generate(job)
        except Exception as e:
            reason = f"error: {type(e).__name__}: {e}"
        job.receive("", reason)

    async def _generate(self, job: Job) -> str:
        s = job.settings
        sampling = SamplingParams(
            max_tokens=job.limit,
            temperature=s.temperature if s.do_sample else 0.0,
            top_k=s.top_k if s.do_sample else 0,
            top_p=s.top_p if s.do_sample else 1.0,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            stop=list(s.stop) or None,
            output_kind=RequestOutputKind.DELTA,
        )
        number = str(next(self._numbers))
        async for output in self._engine.generate({"prompt_token_ids": list(job.ids)}, sampling, number):
            if self._closed or job.cancelled():
                await self._engine.abort(number)
                return "cancelled"
            part = output.outputs[0]
            if part.text:
                job.receive(part.text, None)
            if part.finish_reason is not None:
                return str(part.finish_reason)
        return "stop"

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
