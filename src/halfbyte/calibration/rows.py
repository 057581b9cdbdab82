"""Rows with a ``text`` or a ``messages`` field, from a JSON-lines file or a data set: one sequence a row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.tokenizing import encode, first_line, load_tokenizer, quiet
from halfbyte.errors import CalibrationError


def jsonl_rows(request: Request) -> Found:
    """``jsonl:FILE``: the first ``samples`` rows that are not empty, in the file's order.

    Raises:
        CalibrationError: the file cannot be read, or a line is not a row, naming it; or every row is empty.
    """
    path = Path(request.argument)
    try:
        sequences = tokenize_rows(parsed_lines(path), request)
    except OSError as e:
        raise CalibrationError(
            f"cannot be read: {e.strerror}", where=str(path), remedy="Give a JSON-lines file."
        ) from None
    except UnicodeDecodeError:
        raise CalibrationError("is not UTF-8 text", where=str(path), remedy="Convert it to UTF-8.") from None
    return found_rows(sequences, request, path.name)


def parsed_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's whereabouts and what its JSON holds; empty lines give nothing."""
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as e:
                raise CalibrationError(
                    f"not valid JSON: {e.msg} (column {e.colno})",
                    where=where,
                    remedy="Every line must be one JSON object.",
                ) from None
            except RecursionError:
                raise CalibrationError("its JSON is nested too deeply to be read", where=where) from None


def tokenize_rows(rows: Iterable[tuple[str, Any]], request: Request) -> list[torch.Tensor]:
    """Tokenise ``(where, row)`` pairs until there are ``samples`` sequences; empty rows give none.

    ``text`` is tokenised with the special tokens that the tokenizer adds by itself; ``messages`` are rendered with
    the chat template, whose own special tokens are all there is. Each is cut to its first ``seq_len`` tokens.
    """
    tokenizer = load_tokenizer(request.model_path)
    sequences: list[torch.Tensor] = []
    for where, row in rows:
        ids = _row_ids(tokenizer, row, where)
        if ids:
            sequences.append(torch.tensor(ids[: request.seq_len], dtype=torch.int64))
        if len(sequences) == request.samples:
            break
    return sequences


def _row_ids(tokenizer: Any, row: Any, where: str) -> list[int]:
    remedy = "Each row needs a field 'text' (a string) or 'messages' (a list of {role, content})."
    if not isinstance(row, dict):
        raise CalibrationError(f"is a JSON {type(row).__name__}, not an object", where=where, remedy=remedy)
    if isinstance(row.get("text"), str):
        return encode(tokenizer, row["text"], special=True) if row["text"].strip() else []
    if isinstance(row.get("messages"), list):
        return encode(tokenizer, render(tokenizer, row["messages"], where), special=False) if row["messages"] else []
    raise CalibrationError("has no field 'text' or 'messages'", where=where, remedy=remedy)


def render(tokenizer: Any, messages: list[Any], where: str) -> str:
    """A conversation through the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise CalibrationError(
            "has 'messages', but the model has no chat template",
            where=where,
            remedy="Give rows with 'text' for a base model, or add chat_template.jinja to the checkpoint.",
        )
    try:
        with quiet():
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as e:  # templates raise what they like
        refusal = first_line(e)
    try:  # those of multimodal models may want lists of parts
        with quiet():
            return str(tokenizer.apply_chat_template([_in_parts(m) for m in messages], tokenize=False))
    except Exception:
        raise CalibrationError(
            f"the chat template refuses these messages: {refusal}",
            where=where,
            remedy="Check roles, their order and that every message has content.",
        ) from None


def _in_parts(message: Any) -> Any:
    if isinstance(message, dict) and isinstance(message.get("content"), str):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message


def found_rows(sequences: list[torch.Tensor], request: Request, name: str) -> Found:
    """Wrap tokenised rows with their description; none at all is an error."""
    if not sequences:
        raise CalibrationError(
            "every row is empty", where=request.argument, remedy="Give rows with some text in 'text' or 'messages'."
        )
    description = f"{len(sequences)} rows of {name}, each cut to {request.seq_len} tokens"
    if len(sequences) < request.samples:
        description += f" (there are no more; {request.samples} were asked for)"
    return Found(sequences=sequences, description=description)
