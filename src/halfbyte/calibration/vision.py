"""``vlm:FOLDER_OR_JSONL``: samples of pictures and words, through the checkpoint's own processor and chat template.

A folder holds ``metadata.jsonl`` (the imagefolder layout: ``file_name`` and ``text``), or pictures, each with its text
in a file of the same name that ends in ``.txt``; a picture without text is given :data:`conversation.INSTRUCTION`. Rows
of JSON-lines files are described in ``conversation``.

Words go through the chat template, which says where pictures stand. A ``text`` that holds the model's own placeholder
as often as there are pictures counts as rendered already. Then the processor turns each placeholder into as many tokens
as the picture takes. A sample longer than ``seq_len`` is cut behind its last picture; where the pictures alone are
longer it is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.conversation import INSTRUCTION, Conversation, read_row
from halfbyte.calibration.pictured import Pictured, Processing, picture_shapes
from halfbyte.calibration.pictures import SUFFIXES
from halfbyte.calibration.processing import load_processor, picture_token_ids
from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.rows import parsed_lines
from halfbyte.calibration.text import read_text
from halfbyte.calibration.tokenizing import encode, first_line, quiet
from halfbyte.errors import CalibrationError
from halfbyte.records import read_json

METADATA = "metadata.jsonl"
MAX_TEXT_CHARACTERS = 1 << 20
RAW_PART = "{'type':"
LAYOUT = f"Give a JSON-lines file, or a folder with {METADATA}, or with pictures and their texts (a.jpg, a.txt)."


def pictured_rows(request: Request) -> Found:
    """The first ``samples`` rows of a file or folder that are not empty, in its order (a folder's: by name).

    Raises:
        CalibrationError: there is no such file, a row is malformed or its picture cannot be read (both are named), no
            row holds anything, or every one is longer than ``seq_len`` by its pictures alone.
        CheckpointError, MissingDependencyError: the checkpoint's processor cannot be loaded.
    """
    path = Path(request.argument)
    try:
        return prepare(_rows(path), request, path.name or str(path))
    except OSError as e:
        raise CalibrationError(f"cannot be read: {e.strerror}", where=str(path), remedy=LAYOUT) from None
    except UnicodeDecodeError:
        raise CalibrationError("is not UTF-8 text", where=str(path), remedy="Convert it to UTF-8.") from None


def _rows(path: Path) -> Iterator[Conversation]:
    if path.is_dir():
        path, folder = path / METADATA, path
        if not path.exists():
            yield from _loose_pictures(folder)
            return
    elif not path.exists():
        raise CalibrationError("there is no such file or folder", where=str(path), remedy=LAYOUT)
    for where, row in parsed_lines(path):
        yield read_row(row, path.parent, where)


def _loose_pictures(folder: Path) -> Iterator[Conversation]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise CalibrationError("holds no pictures", where=str(folder), remedy=LAYOUT)
    for path in found:
        text = path.with_suffix(".txt")
        row = {"image": path.name}
        if text.exists():
            row["text"] = read_text(text, limit=MAX_TEXT_CHARACTERS)
        yield read_row(row, path.parent, str(path))


@dataclass(slots=True)
class _Tally:
    """What became of rows: samples that were taken, and counts of those that were not or not whole."""

    sequences: list[torch.Tensor] = field(default_factory=list)
    pictured: dict[int, Pictured] = field(default_factory=dict)
    instructed: int = 0
    cut: int = 0
    too_long: list[int] = field(default_factory=list)  # what each would have needed


def prepare(rows: Iterable[Conversation], request: Request, name: str) -> Found:
    """Put conversations through the processor until there are ``samples``; rows with nothing in them give none.

    ``name`` is what the description calls the source. Raises as :func:`pictured_rows` does.
    """
    processing = Processing(request.model_path, load_processor(request.model_path))
    standing_for = picture_token_ids(read_json(request.model_path / "config.json"), processing.processor)
    tally = _Tally()
    request.reporter.start("preparing pictures", request.samples)
    for row in rows:
        if row.turns and _take(row, processing, standing_for, request.seq_len, tally):
            request.reporter.advance()
        if len(tally.sequences) == request.samples:
            break
    request.reporter.finish()
    if not tally.sequences and tally.too_long:
        raise CalibrationError(
            f"the pictures of every row take more than --seq-len {request.seq_len} tokens",
            where=request.argument,
            remedy=f"Use at least --seq-len {min(tally.too_long)}, the least that one needs, or scale pictures down.",
        )
    if not tally.sequences:
        raise CalibrationError("every row is empty", where=request.argument, remedy=LAYOUT)
    return Found(sequences=tally.sequences, pictured=tally.pictured, description=_description(tally, request, name))


def _take(row: Conversation, processing: Processing, standing_for: frozenset[int], seq_len: int, tally: _Tally) -> bool:
    """Add a row's sample; false where its pictures leave no room."""
    text, special = rendered(processing.processor, row)
    if not row.pictures:
        ids = torch.tensor(encode(processing.processor.tokenizer, text, special=special), dtype=torch.int64)
        if len(ids):
            tally.sequences.append(ids[:seq_len])
            tally.cut += len(ids) > seq_len
        return bool(len(ids))
    sample = Pictured(where=row.where, text=text, special=special, pictures=row.pictures)
    made = processing.run(sample)
    ids = made["input_ids"][0]
    # Without knowing which tokens stand for pictures, none may be cut away.
    behind = torch.nonzero(torch.isin(ids, torch.tensor(sorted(standing_for)))).flatten()
    needed = int(behind[-1]) + 1 if len(behind) else len(ids)
    if needed > seq_len:
        tally.too_long.append(needed)
        return False
    tally.pictured[len(tally.sequences)] = replace(sample, shapes=picture_shapes(made))
    tally.sequences.append(ids[:seq_len].clone())
    tally.cut += len(ids) > seq_len
    tally.instructed += row.instructed
    return True


def rendered(processor: Any, row: Conversation) -> tuple[str, bool]:
    """The text that the processor takes, and whether the tokenizer is to add its special tokens to it.

    Raises:
        CalibrationError: there is no chat template, it refuses the turns, or it does not show each picture once.
    """
    tokenizer, placeholder = processor.tokenizer, processor.image_token
    if row.text is not None and row.pictures and row.text.count(placeholder) == len(row.pictures):
        bos = tokenizer.bos_token
        return row.text, not (bos and row.text.startswith(bos))
    template = processor.chat_template or tokenizer.chat_template
    if not template:
        if row.text is not None and not row.pictures and placeholder not in row.text:
            return row.text, True
        raise CalibrationError(
            "the model has no chat template to say where pictures stand",
            where=row.where,
            remedy=f"Add chat_template.jinja to the checkpoint, or write {placeholder} into 'text' for each picture.",
        )
    fitting, refusal = [], ""
    # Some templates take parts, some plain strings, and leave out or print raw what they do not understand.
    for turns in (row.turns, _plain(row.turns)):
        try:
            with quiet():
                text = str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
        except Exception as e:  # templates raise what they like
            refusal = refusal or f"the chat template refuses this row: {first_line(e)}"
            continue
        count = text.count(placeholder)
        if count != len(row.pictures):
            refusal = (
                refusal or f"the chat template writes {placeholder} {count} times for {len(row.pictures)} pictures"
            )
        elif RAW_PART not in text:
            fitting.append(text)
    if fitting:
        return next((text for text in fitting if _shows(text, row)), fitting[0]), False
    raise CalibrationError(
        refusal or "the chat template cannot read parts of content",
        where=row.where,
        remedy=f"Check roles, their order and that no text holds {placeholder}, or give 'text' as it is when rendered.",
    )


def _shows(text: str, row: Conversation) -> bool:
    """Whether the words of every turn are there (a template may drop some on purpose, such as earlier reasoning)."""
    return all(p["text"].strip() in text for t in row.turns for p in t["content"] if p["type"] == "text")


def _plain(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns with strings for content wherever there is no picture in it."""
    return [
        {**t, "content": "".join(p["text"] for p in t["content"])}
        if all(p["type"] == "text" for p in t["content"])
        else t
        for t in turns
    ]


def _description(tally: _Tally, request: Request, name: str) -> str:
    pictures = sum(len(s.pictures) for s in tally.pictured.values())
    parts = [
        f"{len(tally.sequences)} rows of {name}, {len(tally.pictured)} of them with {pictures} pictures, "
        f"each of at most {request.seq_len} tokens"
    ]
    if len(tally.sequences) < request.samples:
        parts.append(f"there are no more; {request.samples} were asked for")
    if tally.too_long:
        parts.append(
            f"{len(tally.too_long)} were left out because their pictures alone take more, up to {max(tally.too_long)}"
        )
    if tally.cut:
        parts.append(f"{tally.cut} were cut behind their last picture")
    if tally.instructed:
        parts.append(f"{tally.instructed} pictures without text were given the words {INSTRUCTION!r}")
    return parts[0] + (f" ({'; '.join(parts[1:])})" if parts[1:] else "")
