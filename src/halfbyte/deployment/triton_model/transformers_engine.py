"""transformers as the engine: runs everything that transformers loads, on a CPU or on GPUs.

Prompts that wait and are alike in their settings are generated as one batch, padded on the left, while further ones
wait. Quantised weights are unpacked when they are loaded, so memory is that of the dense model.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from text import Growing, conversation
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from engine import Job, Options


class TransformersEngine:
    """See :class:`engine.Engine`."""

    def __init__(self, options: Options) -> None:
        folder = str(options.checkpoint)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model = load(options)
        self._max_batch = options.max_batch
        made_for = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self.context = options.context or made_for or self._tokenizer.model_max_length
        eos = self._model.generation_config.eos_token_id
        eos = self._tokenizer.eos_token_id if eos is None else eos
        self._eos = {eos} if isinstance(eos, int) else set(eos or ())
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None else min(self._eos, default=0)
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text).input_ids)

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        return conversation(self._tokenizer, messages)

    def submit(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            self._waiting += jobs
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
            self._changed.notify()
        for job in left:
            job.receive("", "cancelled")
        self._thread.join(timeout=60)

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            try:
                self._generate(jobs)
            except Exception as e:
                for job in jobs:
                    job.receive("", f"error: {type(e).__name__}: {e}")

    def _next(self) -> list[Job] | None:
        """The prompt that has waited longest, with those that can be generated beside it."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            kind = alike(self._waiting[0])
            chosen = [job for job in self._waiting if alike(job) == kind][: self._max_batch]
            self._waiting = [job for job in self._waiting if all(job is not c for c in chosen)]
            return chosen

    def _generate(self, jobs: list[Job]) -> None:
        width = max(len(job.ids) for job in jobs)
        ids = torch.full((len(jobs), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(jobs):
            ids[row, width - len(job.ids) :] = torch.tensor(job.ids)
            mask[row, width - len(job.ids) :] = 1
        rows = Rows(jobs, self._tokenizer, self._eos, lambda: self._closed)
        settings = jobs[0].settings
        if settings.do_sample and settings.seed is not None:
            torch.manual_seed(settings.seed)
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=self._config(jobs),
                streamer=rows,
                stopping_criteria=StoppingCriteriaList([rows.finished()]),
            )

    def _config(self, jobs: list[Job]) -> GenerationConfig:
        settings = jobs[0].settings
        config = copy.deepcopy(self._model.generation_config)
        config.update(
            do_sample=settings.do_sample,
            temperature=settings.temperature if settings.do_sample else None,
            top_k=settings.top_k if settings.do_sample else None,
            top_p=settings.top_p if settings.do_sample else None,
            repetition_penalty=settings.repetition_penalty,
            max_new_tokens=max(job.limit for job in jobs),
            max_length=None,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._eos) or None,
            num_beams=1,
        )
        return config


class Rows(BaseStreamer):  # type: ignore[misc]
    """Follows a batch token by token: sends text, and says which rows are done."""

    def __init__(self, jobs: Sequence[Job], tokenizer: Any, eos: set[int], closed: Any) -> None:
        self._jobs, self._eos, self._closed = jobs, eos, closed
        self._texts = [
            Growing(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), j.settings.stop) for j in jobs
        ]
        self.done = [False] * len(jobs)
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompts, then one token of each row a call; padding behind rows that are done."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.flatten().tolist()):
            if not self.done[row]:
                self._add(row, token)

    def end(self) -> None:
        for row, done in enumerate(self.done):
            if not done:
                self._finish(row, "", "length")

    def finished(self) -> StoppingCriteria:
        """For ``generate``: ends it row by row."""
        rows = self

        class Finished(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.tensor(rows.done, device=input_ids.device)

        return Finished()

    def _add(self, row: int, token: int) -> None:
        job, text = self._jobs[row], self._texts[row]
        if token in self._eos:
            self._finish(row, "", "stop")
            return
        piece = text.add(token)
        if text.stopped:
            self._finish(row, piece, "stop")
        elif text.tokens >= job.limit:
            self._finish(row, piece, "length")
        elif self._closed() or job.cancelled():
            self._finish(row, "", "cancelled")
        elif piece:
            job.receive(piece, None)

    def _finish(self, row: int, piece: str, reason: str) -> None:
        self.done[row] = True
        self._jobs[row].receive(piece + self._texts[row].end(), reason)


def alike(job: Job) -> tuple[Any, ...]:
    """Prompts for which this is equal can be one batch and still get what each would get alone.

    Padding counts as text for the repetition penalty, so it has to be none then; and who draws with a seed draws alone.
    """
    s = job.settings
    drawing = (s.temperature, s.top_k, s.top_p) if s.do_sample else None
    width = len(job.ids) if s.repetition_penalty != 1 else None
    return drawing, s.repetition_penalty, width, (s.seed, job.together) if s.do_sample and s.seed is not None else None


def load(options: Options) -> Any:
    """The model: on GPUs where there are any, in the checkpoint's dtype; else on the CPU in float32, which most CPUs
    multiply fastest. Compressed-tensors checkpoints are unpacked at once. Models that see get text alone."""
    folder = str(options.checkpoint)
    gpu = options.gpus > 0 and torch.cuda.is_available()
    dtype = options.dtype if options.dtype != "auto" else "auto" if gpu else "float32"
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    extra: dict[str, Any] = {"device_map": "auto"} if gpu else {}
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and dict(quantization).get("quant_method") == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=dtype, local_files_only=True, **extra).eval()
