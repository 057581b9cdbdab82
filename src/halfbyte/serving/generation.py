"""Text from a transformers model, piece by piece: what the server of :mod:`transformers_process` streams.

One request at a time. Sampling is transformers' own ``generate``; here are reading a request, turning tokens into text
as they come, and stopping at strings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from halfbyte.serving.api import TOO_LONG, ApiError

Finish = Literal["stop", "length"]
# A character may be cut by a token's end; longer than this, the bytes are no UTF-8 and are shown as they are.
LONGEST_CHARACTER = 8
NO_TOKEN = -1  # None would be the model's own
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # field -> values that ask for nothing
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; ``None`` is what the checkpoint's generation_config says.

    Attributes:
        temperature: 0 for the likeliest token each time.
        max_tokens: of the answer; ``None`` for what fits.
        ignore_eos: write ``max_tokens`` whatever the model wants; for measuring, as vLLM and llama.cpp have it.
        stop: strings at which the answer ends; they are not part of it.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    max_tokens: int | None
    ignore_eos: bool
    stop: tuple[str, ...]


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """Read what a request says about sampling.

    Raises:
        ApiError: a value is of another kind or out of bounds, or asks for what this engine does not do.
    """
    for name, nothing in UNSUPPORTED.items():
        if not any(body.get(name) == value for value in nothing):
            raise ApiError(
                400,
                f"{name!r} is not supported by the transformers engine; llama.cpp and vLLM have it.",
                param=name,
                code="unsupported",
            )
    stop = body.get("stop")
    strings = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(strings, list) or len(strings) > 16 or not all(isinstance(s, str) and s for s in strings):
        raise ApiError(400, "'stop' has to be a string or a list of at most 16 strings, none empty.", param="stop")
    if not isinstance(body.get("ignore_eos", False), bool):
        raise ApiError(400, "'ignore_eos' has to be true or false.", param="ignore_eos")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    top_k = _number(body, "top_k", -1, 1 << 31, whole=True)
    return Sampling(
        temperature=_number(body, "temperature", 0, 100),
        top_p=_number(body, "top_p", 0, 1),
        top_k=None if top_k is None else int(top_k),
        repetition_penalty=_number(body, "repetition_penalty", 0.01, 100),
        seed=_whole(body, "seed", -(1 << 63), (1 << 63) - 1),
        max_tokens=_whole(body, limit, 1, 1 << 31),
        ignore_eos=body.get("ignore_eos", False),
        stop=tuple(strings),
    )


def _whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = _number(body, name, least, most, whole=True)
    return None if value is None else int(value)


def _number(body: Mapping[str, Any], name: str, least: float, most: float, *, whole: bool = False) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not right or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise ApiError(400, f"{name!r} has to be {kind} from {least} to {most}, not {value!r}.", param=name)
    found: float = value
    return found


class Pieces:
    """Tokens to text, as they come: :meth:`add` returns what is certain by now.

    Text is held back while a token's bytes end within a character, and while its end could become a stop string.

    Args:
        decode: token ids to text.
        stop: strings at which the text ends.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        self._from = 0  # ids before are text of which nothing depends any more
        self._shown = ""  # of the text of ids[_from:], what is in _held or given out
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that becomes certain with one more token."""
        self._ids.append(token)
        text = self._decode(self._ids[self._from :])
        if text.endswith("\ufffd") and len(text) - len(self._shown) < LONGEST_CHARACTER:
            return ""
        self._held += text[len(self._shown) :]
        # The last token stays: some tokenizers drop a space at the start of a text.
        self._shown = self._decode(self._ids[-1:])
        self._from = len(self._ids) - 1
        return self._release()

    def end(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        text = self._decode(self._ids[self._from :])
        self._held += text[len(self._shown) :]
        out = self._release()
        if not self.stopped:
            out, self._held = out + self._held, ""
        return out

    def _release(self) -> str:
        places = [place for s in self._stop if (place := self._held.find(s)) >= 0]
        if places:
            self.stopped = True
            out, self._held = self._held[: min(places)], ""
            return out
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """How an answer ended, and its tokens."""

    finish: Finish
    prompt_tokens: int
    tokens: int


class Writer:
    """A model and its tokenizer.

    Args:
        model: of transformers; tokenizer: its.
        context: tokens of prompt and answer, at most.
    """

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self._model, self._tokenizer, self.context = model, tokenizer, context
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if tokenizer.eos_token_id is not None:
            self._ends.add(tokenizer.eos_token_id)

    def chat_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, through the checkpoint's chat template.

        Raises:
            ApiError: there is no template, a message is not text, or the template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ApiError(
                400, "The model has no chat template; use /v1/completions.", param="messages", code="unsupported"
            )
        plain = [{**m, "content": _plain_text(m.get("content"), i)} for i, m in enumerate(messages)]
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError, ValueError) as e:
            raise ApiError(400, f"The chat template refuses the conversation: {e}", param="messages") from None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a text, or ids as they are.

        Raises:
            ApiError: it is neither, or several.
        """
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            return self.text_prompt(prompt[0])
        size = self._model.get_input_embeddings().num_embeddings
        if isinstance(prompt, list) and prompt and all(type(t) is int and 0 <= t < size for t in prompt):
            return prompt
        raise ApiError(
            400, "'prompt' has to be one string or one list of tokens of the model's vocabulary.", param="prompt"
        )

    def write(self, ids: list[int], how: Sampling, tell: Callable[[str], None], stop: threading.Event) -> Written:
        """Continue a prompt, in this thread, until it ends or ``stop`` is set.

        Args:
            ids: of the prompt.
            how: to draw.
            tell: hears each piece of text.
            stop: set by another thread to end early.

        Raises:
            ApiError: the prompt leaves no room for an answer.
        """
        import torch

        room = self.context - len(ids)
        if not ids:
            raise ApiError(400, "The prompt is empty.", param="prompt")
        if room < 1:
            raise ApiError(
                400,
                f"The prompt has {len(ids)} tokens; with an answer at most {self.context} are possible.",
                code=TOO_LONG,
            )
        limit = min(room, how.max_tokens or room)
        ends = set() if how.ignore_eos else self._ends
        watch = _Watch(Pieces(self._text, how.stop), ends, tell, stop)
        if how.seed is not None:
            torch.manual_seed(how.seed)
        prompt = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=limit,
                streamer=watch,
                stopping_criteria=[watch.over],
                eos_token_id=sorted(ends) or [NO_TOKEN],
                **_options(how),
            )
        watch.finish()
        return Written(finish="stop" if watch.ended else "length", prompt_tokens=len(ids), tokens=watch.tokens)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Watch:
    """Hears every token from ``generate`` (its streamer protocol) and says when to stop (its criteria's)."""

    def __init__(self, pieces: Pieces, ends: set[int], tell: Callable[[str], None], stop: threading.Event) -> None:
        self._pieces, self._ends, self._tell, self._stop = pieces, ends, tell, stop
        self._prompt_seen = False
        self.tokens, self.ended = 0, False

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.tokens += 1
            if token in self._ends:
                self.ended = True
            else:
                self._say(self._pieces.add(token))

    def end(self) -> None:
        """Called by ``generate``; :meth:`finish` is what counts."""

    def finish(self) -> None:
        if not self._pieces.stopped:
            self._say(self._pieces.end())
        self.ended = self.ended or self._pieces.stopped

    def over(self, ids: Any, scores: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), self._pieces.stopped or self._stop.is_set(), device=ids.device)

    def _say(self, text: str) -> None:
        if text:
            self._tell(text)


def _options(how: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if how.temperature == 0:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    else:
        options["do_sample"] = True
        options |= {} if how.temperature is None else {"temperature": float(how.temperature)}
        options |= {} if how.top_p is None else {"top_p": float(how.top_p)}
        options |= {} if how.top_k is None else {"top_k": max(how.top_k, 0)}
    if how.repetition_penalty is not None:
        options["repetition_penalty"] = float(how.repetition_penalty)
    return options


def _plain_text(content: Any, number: int) -> str:
    """A message's text; parts of text are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(str(p.get("text", "")) for p in content)
    raise ApiError(
        400,
        f"messages[{number}] holds something else than text, and the transformers engine serves text alone.",
        param=f"messages[{number}].content",
        code="unsupported",
    )
