"""``self``: the model writes its own calibration text.

No data set, account or network is needed, and the text comes from the distribution the model was trained on
(self-calibration: arXiv 2410.17170). Every sequence starts at the model's beginning-of-text token (where it has none:
its end-of-text token, which separates documents in training). For a model with a chat template half of the sequences
start with the template's opening of a user turn, so that the model writes the question too (Magpie, arXiv 2406.08464);
when it ends a turn, the template's text up to the next turn is put in, and it goes on in the other role. Elsewhere a
sampled end-of-text token is followed by the beginning of a new text, which is a conversation where there is a template
(a chat model that is given its BOS again and again writes empty texts). All sequences have exactly ``seq_len`` tokens.

Sampling is at temperature 1, with tokens less than :data:`MIN_P` times as probable as the likeliest left out (min-p,
arXiv 2407.01082): the tail of a small model's distribution is noise, and a threshold costs no sort of the vocabulary.
A token is drawn by inverting the cumulative distribution with one uniform number a row, which stays cheap at 262,144
tokens. Numbers come from a generator of its own, so no global random state is read or changed; the result is the same
for the same seed, device, thread count and library versions.

The cache writes into memory allocated once. Growing it by concatenation, as transformers does by default, copies all of
it at every position: 44 s instead of 34 s for the first 200 positions of 48 rows (SmolLM2-135M, two cores), and the
difference grows with the square of the length.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.chat_frame import ChatFrame, chat_frame
from halfbyte.calibration.memory import rows_per_batch
from halfbyte.calibration.preallocated import preallocated_cache
from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.tokenizing import first_line, load_tokenizer, quiet, text_config
from halfbyte.errors import CheckpointError, NumericsError

MIN_P = 0.05
MODALITY_WORDS = ("image", "video", "audio", "vision")


@dataclass(slots=True, kw_only=True)
class Writer:
    """One sequence in the making.

    Attributes:
        tokens: what it holds.
        pending: tokens that come before the model may choose again.
        frame: the chat template's, ``None`` for a model without one.
        turn: whose words are being written, 0 the user's, 1 the assistant's, ``None`` outside a conversation.
    """

    tokens: list[int] = field(default_factory=list)
    pending: list[int]
    frame: ChatFrame | None
    turn: int | None


def self_generated(request: Request) -> Found:
    """``samples`` sequences of exactly ``seq_len`` tokens, written by the model.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded, or it has no token to start from.
        NumericsError: its logits are not finite.
    """
    tokenizer = load_tokenizer(request.model_path)
    model = load_model(request.model_path, request.device)
    stops = _stop_ids(tokenizer, model)
    start = _start_id(tokenizer, model, request.model_path)
    frame = chat_frame(tokenizer)
    # A frame longer than half a sequence would leave more template than text.
    if frame is not None and len(frame.opening) > request.seq_len // 2:
        frame = None
    chats = request.samples // 2 if frame is not None else 0
    turns = [None] * (request.samples - chats) + [0] * chats
    barred = _barred_ids(
        request.model_path, len(tokenizer), model.config.get_text_config().vocab_size, tokenizer, stops
    )

    generator = torch.Generator().manual_seed(request.seed)
    rows = rows_per_batch(text_config(request.model_path), request.seq_len, request.device)
    batches = [turns[i : i + rows] for i in range(0, len(turns), rows)]
    request.reporter.start("writing calibration text", len(batches) * request.seq_len)
    sequences: list[torch.Tensor] = []
    for batch in batches:
        writers = [Writer(pending=_beginning(start, None if t is None else frame), frame=frame, turn=t) for t in batch]
        write(model, writers, request, generator, barred=barred, start=start, stops=stops)
        sequences += [torch.tensor(w.tokens, dtype=torch.int64) for w in writers]
    request.reporter.finish()
    del model
    gc.collect()  # a model may refer to itself, and its memory is wanted for what comes next
    return Found(
        sequences=sequences,
        description=f"{request.samples} x {request.seq_len} tokens that the model wrote itself"
        + (f", {chats} of them as conversations" if chats else ""),
    )


@torch.inference_mode()
def write(
    model: Any,
    writers: list[Writer],
    request: Request,
    generator: torch.Generator,
    *,
    barred: torch.Tensor,
    start: int,
    stops: frozenset[int],
) -> None:
    """Fill every writer with ``seq_len`` tokens, one position at a time for all of them.

    Starting texts are fed token by token like everything else, so sequences that start differently share one batch
    without padding.
    """
    cache = preallocated_cache(model.config, request.seq_len)
    sampled = [start] * len(writers)
    barred = barred.to(request.device)
    for position in range(request.seq_len):
        for writer, token in zip(writers, sampled, strict=True):
            place(writer, token, start=start, stops=stops)
        request.reporter.advance()
        if position + 1 == request.seq_len:
            break
        ids = torch.tensor([[w.tokens[-1]] for w in writers], device=request.device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        uniform = torch.rand(len(writers), 1, generator=generator).to(request.device)
        sampled = draw(logits, uniform, barred).tolist()


def place(writer: Writer, sampled: int, *, start: int, stops: frozenset[int]) -> None:
    """Append the next token: what is pending, else what was sampled; the end of a turn or text brings the next one."""
    if writer.pending:
        writer.tokens.append(writer.pending.pop(0))
    elif writer.frame is not None and writer.turn is not None:
        first, *rest = writer.frame.bridges[writer.turn]
        ended = sampled == first or sampled in stops
        writer.tokens.append(first if ended else sampled)
        if ended:
            writer.pending, writer.turn = rest, 1 - writer.turn
    else:
        writer.tokens.append(sampled)
        if sampled in stops:
            writer.pending = _beginning(start, writer.frame)
            writer.turn = None if writer.frame is None else 0


def _beginning(start: int, frame: ChatFrame | None) -> list[int]:
    return [start] if frame is None else list(frame.opening)


def draw(logits: torch.Tensor, uniform: torch.Tensor, barred: torch.Tensor) -> torch.Tensor:
    """Sample one token a row at temperature 1 with min-p.

    Args:
        logits: [rows, vocabulary], any float dtype.
        uniform: float32 [rows, 1] in [0, 1).
        barred: bool [vocabulary], true for tokens that are never drawn.

    Returns:
        int64 [rows]: the first token at which the cumulative probability exceeds ``uniform`` times its total.

    Raises:
        NumericsError: a row has no finite maximum.
    """
    weights = logits.float().masked_fill(barred, -torch.inf)  # a copy; the rest happens in place
    weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
    cumulative = weights.masked_fill_(weights < MIN_P, 0.0).cumsum_(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()) or bool((total == 0).any()):
        raise NumericsError(
            "the model's logits are not finite while it writes calibration text",
            remedy="Check its weights for NaN or infinity (halfbyte verify names them).",
        )
    # The target lies below the total, and right=True steps over tokens of zero weight.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def load_model(model_path: Path, device: str) -> Any:
    """The whole model: float32 on a CPU, bfloat16 on a GPU; never with code from the checkpoint."""
    import transformers

    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(model_path, trust_remote_code=False, local_files_only=True)
            causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
            model = loader.from_pretrained(
                model_path, config=config, dtype=dtype, trust_remote_code=False, local_files_only=True
            )
    except Exception as e:  # transformers raises whatever went wrong inside it
        raise CheckpointError(
            f"transformers cannot load the model: {type(e).__name__}: {first_line(e)}",
            where=str(model_path),
            remedy="Calibrate with text:FILE, which does not need the whole model.",
        ) from None
    return model.eval().to(device)


def _stop_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    named = model.generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _start_id(tokenizer: Any, model: Any, model_path: Path) -> int:
    for candidate in (tokenizer.bos_token_id, model.generation_config.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise CheckpointError(
        "names neither a BOS nor an EOS token for the model to start from",
        where=str(model_path),
        remedy="Calibrate with text:FILE.",
    )


def _barred_ids(model_path: Path, known: int, vocab_size: int, tokenizer: Any, stops: frozenset[int]) -> torch.Tensor:
    """Tokens that the model must not write: rows without a token, padding, placeholders for images and sounds."""
    from halfbyte.records import read_json

    barred = torch.zeros(vocab_size, dtype=torch.bool)
    barred[known:] = True
    config = read_json(model_path / "config.json")
    placeholders = [
        value
        for key, value in config.items()
        if key.endswith(("_token_id", "_token_index")) and any(word in key for word in MODALITY_WORDS)
    ]
    for token in (*placeholders, tokenizer.pad_token_id):
        if isinstance(token, int) and 0 <= token < vocab_size and token not in stops:
            barred[token] = True
    return barred
