"""lm-eval's questions put to llama.cpp, in this process (package xllamacpp), with quantised weights as they are.

llama.cpp's server gives no probabilities of a prompt's own tokens. It gives those of what it draws, so each token of a
continuation is forced by a bias, which counts when drawing but not in the probability that is reported; the prompt
before it stays in the cache. Choices of one token cost one pass.
"""

from __future__ import annotations

import json
import logging
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from transformers import AutoTokenizer

from halfbyte.conversion.gguf_cache import to_gguf
from halfbyte.errors import CheckpointError, HalfbyteError, UsageError
from halfbyte.evaluation.harness import MODELS_LOG
from halfbyte.progress import Reporter

TIMEOUT_S = 1800


def own_gguf(folder: Path) -> Path | None:
    """The first GGUF in a checkpoint's folder."""
    return next((f for f in sorted(folder.glob("*.gguf")) if not f.name.startswith("mmproj")), None)


def gguf_of(folder: Path, kept: Path, reporter: Reporter) -> Path:
    """The GGUF of a checkpoint: the one in its folder, or one that is converted into the folder ``kept``."""
    return own_gguf(folder) or to_gguf(folder, kept, reporter=reporter).model


class LlamaCppLM(TemplateLM):  # type: ignore[misc]
    """llama.cpp as lm-eval sees it.

    Args:
        model: GGUF file.
        folder: the checkpoint's, for tokenizer and chat template.
        max_length: tokens of context; threads: ``None`` is llama.cpp's choice.
    """

    def __init__(self, model: Path, folder: Path, *, max_length: int = 4096, threads: int | None = None) -> None:
        import xllamacpp

        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._max_length = max_length
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_batch, params.n_parallel = max_length, min(max_length, 2048), 1
        params.warmup = False
        if threads:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as e:
            raise CheckpointError(f"llama.cpp cannot load it: {e}", where=str(model)) from None

    def close(self) -> None:
        """Free the model."""
        del self._server

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def _cut(self, tokens: list[int], length: int) -> list[int]:
        if len(tokens) > length:
            logging.getLogger(MODELS_LOG).warning("truncated from %d to %d tokens", len(tokens), length)
        return tokens[-length:]

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + "/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as e:
            raise HalfbyteError(f"llama.cpp refused a request: {e.code} {e.read().decode()[:300]}") from None

    def _next(self, prompt: list[int], token: int) -> tuple[float, bool]:
        """Log probability of ``token`` after ``prompt``, and whether it is the likeliest."""
        body = {"prompt": prompt, "n_predict": 1, "n_probs": 1, "temperature": -1.0, "logit_bias": [[token, 1000.0]]}
        found = self._post(body).get("completion_probabilities") or []
        if found and found[0]["id"] == token:
            return float(found[0]["logprob"]), found[0]["top_logprobs"][0]["id"] == token
        # A token that is no text of its own (part of a character, the end) is drawn without being reported: draw "a",
        # and look the token up among all of them.
        plain = self.tokenizer.encode("a", add_special_tokens=False)[-1]
        body |= {"n_probs": len(self.tokenizer), "logit_bias": [[plain, 1000.0]]}
        listed = self._post(body)["completion_probabilities"][0]["top_logprobs"]
        by_id = {p["id"]: float(p["logprob"]) for p in listed}
        return by_id.get(token, -math.inf), listed[0]["id"] == token

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for pair, context, continuation in requests:
            tokens = self._cut(context + continuation, self._max_length - 1)
            start = len(tokens) - len(continuation)
            parts = [self._next(tokens[:i], tokens[i]) for i in range(start, len(tokens))]
            result = (sum(p for p, _ in parts), all(greedy for _, greedy in parts))
            results.append(result)
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise UsageError(
            "tasks that measure perplexity of whole texts are not asked of llama.cpp",
            where="--backend llamacpp",
            remedy="Use --backend hf, or `halfbyte compare`.",
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        results = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            length = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
            sampled = bool(options.get("do_sample")) and float(options.get("temperature", 0)) > 0
            body = {
                "prompt": self._cut(self.tok_encode(context), self._max_length - length),
                "n_predict": length,
                "temperature": float(options["temperature"]) if sampled else -1.0,
                "stop": until,
                "seed": int(options.get("seed", 0)),
            }
            text = self._post(body)["content"]
            for stop in until:
                text = text.split(stop)[0] if stop else text
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results
