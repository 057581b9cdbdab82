"""Engines that answer lm-eval's requests: transformers, vLLM, llama.cpp, or whatever listens at a URL.

| backend | the quantised model is |
|---|---|
| ``hf`` | dequantised once, by halfbyte's own loader, and run dense |
| ``vllm`` | packed: vLLM in this environment, or served from the one that HALFBYTE_VLLM_PYTHON names |
| ``llamacpp`` | packed: converted to GGUF without loss (kept in the cache) and run by the package xllamacpp |
| ``openai-url`` | whatever a server runs; probabilities of prompts need /v1/completions with echo and logprobs |
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.source import resolve
from halfbyte.errors import MissingDependencyError, UsageError
from halfbyte.evaluation.identity import file_digest
from halfbyte.progress import Reporter
from halfbyte.serving.choice import read_served
from halfbyte.serving.machine import find_vllm, look

NAMES = ("hf", "vllm", "llamacpp", "openai-url")
BATCH_SIZE = 4
# Of a sequence, where --backend-args has no max_length: what vLLM is served with at most, llama.cpp's, and that of a
# server that does not tell its own.
SERVED_TOKENS = 8192
LLAMACPP_TOKENS = 4096
API_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Which engine, and how.

    Attributes:
        name: one of :data:`NAMES`.
        batch_size: requests at a time.
        device: for ``hf``.
        url: of the checkpoint's server (``.../v1``); base_url: of the baseline's. For ``openai-url``.
        chat: answer as a conversation through /v1/chat/completions, which gives no probabilities of prompts.
        arguments: further ones for lm-eval's model class (``max_length=4096``).
    """

    name: str = "hf"
    batch_size: int = BATCH_SIZE
    device: str = "auto"
    url: str | None = None
    base_url: str | None = None
    chat: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def identity(self, folder: Path, *, baseline: bool) -> dict[str, Any]:
        """What of it can change the results of a checkpoint, beside the checkpoint.

        Raises:
            UsageError: no server answers, or there is no vLLM where HALFBYTE_VLLM_PYTHON says.
        """
        found = {"backend": self.name, "chat": self.chat, "arguments": self.arguments}
        url = self.base_url if baseline else self.url
        if self.name == "openai-url" and url is not None:
            found |= {"url": url, "model": served_model(url)[0], "max_length": self.context(folder)}
        elif self.name == "llamacpp":
            from halfbyte.evaluation.llamacpp import own_gguf

            own = own_gguf(folder)
            found |= {} if own is None else {"gguf_sha256": file_digest(own)}
        elif self.name == "vllm" and (vllm := find_vllm()) is not None:
            found["vllm"] = vllm.version
        return found

    @property
    def serves_vllm(self) -> bool:
        """Whether vLLM is in an environment of its own, so that it is asked over HTTP."""
        return self.name == "vllm" and not importlib.util.find_spec("vllm")

    def context(self, folder: Path) -> int | None:
        """Tokens of prompt and answer together, at most; ``None`` where it is not known."""
        own = read_served(folder).context
        default = LLAMACPP_TOKENS if self.name == "llamacpp" else own
        if self.name == "openai-url":  # the same of both, or one would answer prompts that the other sees cut
            default = min(served_model(url)[1] or API_TOKENS for url in (self.url, self.base_url) if url)
        if self.serves_vllm:
            default = min(own or SERVED_TOKENS, SERVED_TOKENS)
        given: Any = self.arguments.get("max_length", default)
        if given is None:
            return None
        return min(int(given), own) if self.serves_vllm and own is not None else int(given)

    def rounds_activations(self, folder: Path) -> bool:
        """Whether inputs of Linears are rounded if a checkpoint (W8A8, W4A8, FP8) asks for it: vLLM and servers do."""
        asked = any(w.input_bits for w in read_served(folder).weights)
        return not asked or self.name in ("vllm", "openai-url")

    def make_ready(self, folder: Path, kept: Path, reporter: Reporter) -> None:
        """Do what can fail before a model is loaded: convert to GGUF, or see whether vLLM has kernels for it.

        Args:
            folder: the checkpoint; kept: folder for its GGUF.

        Raises:
            HalfbyteError: the engine cannot run these weights.
        """
        if self.name == "llamacpp":
            from halfbyte.evaluation.llamacpp import gguf_of

            gguf_of(folder, kept, reporter)
        elif self.serves_vllm:
            from halfbyte.evaluation.vllm_server import require_kernels

            require_kernels(read_served(folder), look())

    def check(self, *, baseline: bool) -> None:
        """Raise what makes it unusable, before any work.

        Raises:
            UsageError, MissingDependencyError: an option or a package is missing.
        """
        if self.name not in NAMES:
            raise UsageError(
                f"there is no backend {self.name!r}", where="--backend", remedy=f"Use one of {', '.join(NAMES)}."
            )
        if self.name == "openai-url" and (self.url is None or (baseline and self.base_url is None)):
            raise UsageError(
                "it needs to know where the models are served",
                where="--backend openai-url",
                remedy="Add --url http://HOST:PORT/v1 for the checkpoint and --base-url for the baseline.",
            )
        if self.name == "llamacpp":
            require("xllamacpp", "llamacpp", "--backend llamacpp")
        if self.name == "vllm" and not (importlib.util.find_spec("vllm") or os.environ.get("HALFBYTE_VLLM_PYTHON")):
            raise MissingDependencyError(
                "vLLM is not installed here",
                where="--backend vllm",
                remedy="Install it, or set HALFBYTE_VLLM_PYTHON to the interpreter of its own environment "
                "(envs/make.sh vllm makes one).",
            )
        if self.name == "openai-url" or self.serves_vllm:
            for package in ("aiohttp", "tenacity"):
                require(package, "eval", f"--backend {self.name}")

    def device_used(self) -> str:
        """``cuda`` or ``cpu``: where ``hf`` runs models."""
        import torch

        return self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")

    @contextlib.contextmanager
    def open(
        self, checkpoint: str | Path, *, baseline: bool, pictures: bool, kept: Path, reporter: Reporter
    ) -> Iterator[Any]:
        """An ``lm_eval.api.model.LM`` for a checkpoint, closed at the end.

        Args:
            checkpoint: a folder or hub id; baseline: which of the two servers is its.
            pictures: whether tasks show some.
            kept: folder for its GGUF; a log of vLLM's lies beside it.
        """
        folder = resolve(checkpoint)
        if self.name == "hf":
            yield self._transformers(folder, pictures)
        elif self.name == "llamacpp":
            from halfbyte.evaluation.llamacpp import LlamaCppLM, gguf_of

            options = {"max_length": LLAMACPP_TOKENS} | self.arguments
            with contextlib.closing(LlamaCppLM(gguf_of(folder, kept, reporter), folder, **options)) as lm:
                yield lm
        elif self.name == "openai-url":
            url = self.base_url if baseline else self.url
            assert url is not None
            yield self._served(url, folder, served_model(url)[0], max_length=self.context(folder))
        elif not self.serves_vllm:
            from lm_eval.api.registry import get_model

            kind = get_model("vllm-vlm" if pictures else "vllm")
            yield kind(pretrained=str(folder), batch_size="auto", **self.arguments)
        else:
            from halfbyte.evaluation.vllm_server import MODEL, serving

            length, log = self.context(folder) or SERVED_TOKENS, kept.with_name(f"{kept.name}.vllm.log")
            with serving(folder, tokens=length, parallel=self.batch_size, log=log, reporter=reporter) as launch:
                url, header = f"http://127.0.0.1:{launch.port}/v1", {"Authorization": f"Bearer {launch.key}"}
                yield self._served(url, folder, MODEL, header=header, max_length=length)

    def _transformers(self, folder: Path, pictures: bool) -> Any:
        import torch
        from transformers import AutoTokenizer

        from halfbyte.loading import load

        device = self.device_used()
        model: Any = load(folder, dtype=torch.float32 if device == "cpu" else None, device=device)
        options = {"batch_size": self.batch_size, **self.arguments}
        if pictures:
            from lm_eval.models.hf_vlms import HFMultimodalLM

            model.config._name_or_path = str(folder)  # where it looks for the processor
            return HFMultimodalLM(pretrained=model, **options)
        from lm_eval.models.huggingface import HFLM

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device=device, **options)

    def _served(self, url: str, folder: Path, model: str, **options: Any) -> Any:
        from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

        kind, path = (LocalChatCompletion, "chat/completions") if self.chat else (LocalCompletionsAPI, "completions")
        # transformers' tokenizers put BOS before texts where the model wants it; lm-eval's API classes have to be told.
        usual = {"num_concurrent": self.batch_size, "max_retries": 3, "add_bos_token": opens_with_bos(folder)}
        options = usual | self.arguments | options
        backend = None if self.chat else "huggingface"
        lm = kind(
            base_url=f"{url.rstrip('/')}/{path}",
            model=model,
            tokenizer=str(folder),
            tokenizer_backend=backend,
            **options,
        )
        if not self.chat and options["add_bos_token"]:
            encode, bos = lm.tok_encode, lm.tokenizer.bos_token_id
            lm.tok_encode = lambda *a, **k: single_bos(encode(*a, **k), bos)
        return lm


def opens_with_bos(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer puts BOS before every text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def single_bos(tokens: Any, bos: int) -> Any:
    """Token ids, of one text or of several, without the second BOS where a chat template has written one already."""
    if tokens and isinstance(tokens[0], list):
        return [single_bos(t, bos) for t in tokens]
    return tokens[1:] if tokens[:2] == [bos, bos] else tokens


def require(package: str, extra: str, where: str) -> None:
    """Raise :class:`MissingDependencyError` where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"the package {package} is needed for this",
            where=where,
            remedy=f'Install it with: pip install "halfbyte[{extra}]"',
        )


def served_model(url: str) -> tuple[str, int | None]:
    """The first model that an OpenAI-compatible server lists, and the tokens of a sequence where it says so.

    vLLM and ``halfbyte serve`` say ``max_model_len``.

    Raises:
        UsageError: no such server answers.
    """
    import requests

    try:
        reply = requests.get(f"{url.rstrip('/')}/models", timeout=30)
        reply.raise_for_status()
        first = reply.json()["data"][0]
        name, context = str(first["id"]), first.get("max_model_len")
    except (requests.RequestException, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise UsageError(
            "no OpenAI-compatible server answers there",
            where=url,
            why=str(e).splitlines()[0][:200],
            remedy="Give the address up to /v1, of a server that is running.",
        ) from None
    return name, context if isinstance(context, int) and context > 0 else None


def parse_arguments(text: str | None) -> dict[str, Any]:
    """``max_length=4096,dtype=auto`` as a dictionary, numbers as numbers.

    Raises:
        UsageError: a part is no ``key=value``.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{part!r} is not KEY=VALUE", where="--backend-args")
        words: dict[str, Any] = {"true": True, "false": False, "none": None}
        parsed: Any = words.get(value.lower(), value)
        for kind in (int, float):
            if isinstance(parsed, str):
                with contextlib.suppress(ValueError):
                    parsed = kind(value)
        found[key.strip()] = parsed
    return found
