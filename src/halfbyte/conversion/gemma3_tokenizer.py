"""The tokenizer that belongs to a Flax checkpoint: the user's folder, or the SentencePiece model that lies beside it.

Kaggle's archives hold a ``tokenizer.model`` and nothing else that is not weights. The ``tokenizer.json`` that engines
want is made from its pieces and scores; which tokens are special, that a text begins with one, and how a chat is
written are facts about Gemma 3 (ai.google.dev/gemma/docs/core/prompt-structure), in our words. Who wants the files that
Google publishes for Hugging Face gives their folder with ``--tokenizer``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import companion_files, licence_files
from halfbyte.conversion.gguf_tokenizer_in import tokenizer_files
from halfbyte.conversion.gguf_tokenizer_out import CONTROL
from halfbyte.conversion.sentencepiece import read_sentencepiece
from halfbyte.errors import CheckpointError, UsageError

MODEL = "tokenizer.model"
IMAGE_TOKEN = "<image_soft_token>"
UNLIMITED = 10**30  # as Google's own tokenizer_config.json says
# Never part of a text, though SentencePiece knows some of them as user-defined.
SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>"),
)
# Any of these makes a folder that of a tokenizer.
KNOWN = (MODEL, "tokenizer.json")

TEMPLATE = """\
{{- bos_token -}}
{%- set first = namespace(words='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first.words = messages[0]['content'] ~ '\\n\\n' -%}
    {%- else -%}
        {%- set first.words = messages[0]['content'] | map(attribute='text') | join ~ '\\n\\n' -%}
    {%- endif -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in ('user', 'assistant') or (message['role'] == 'user') != loop.index is odd -%}
        {{- raise_exception('Gemma 3 takes turns of user and assistant, the first by the user') -}}
    {%- endif -%}
    {{- '<start_of_turn>' ~ ('user' if message['role'] == 'user' else 'model') ~ '\\n' -}}
    {{- first.words if loop.first else '' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<start_of_image>' if part['type'] == 'image' else part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\\n' if add_generation_prompt else '' -}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Files of a tokenizer.

    Attributes:
        companions: that are copied.
        written: contents of those that are made up here, by name.
        notes: for the record.
    """

    companions: Sequence[Path]
    written: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


def find_tokenizer(given: Path | None, beside: Sequence[Path], *, chat: bool, tower: bool, vocab: int) -> Tokenizer:
    """The files that a converted checkpoint gets.

    Args:
        given: what the user named: a folder, or a ``tokenizer.model``.
        beside: folders to look into otherwise.
        chat: whether a chat template belongs to it.
        tower: whether there are pictures, which have a token of their own.
        vocab: rows of the embedding table.

    Raises:
        UsageError: ``given`` holds no tokenizer.
        CheckpointError: there is none beside the checkpoint either.
    """
    if given is not None:
        if given.is_file() and given.suffix == ".model":
            found = _from_model(given, chat=chat, tower=tower, vocab=vocab)
        elif given.is_dir() and any((given / n).is_file() for n in KNOWN):
            found = _from_folder(given, chat=chat, tower=tower, vocab=vocab)
        else:
            raise UsageError(f"holds no tokenizer ({' or '.join(KNOWN)})", where=f"--tokenizer {given}")
        terms = {f.name: f for folder in beside for f in licence_files(folder)}
        own = {f.name: f for f in found.companions}
        return replace(found, companions=list((terms | own).values()))
    for folder in beside:
        if (folder / "tokenizer.json").is_file():
            return _from_folder(folder, chat=chat, tower=tower, vocab=vocab)
        if (folder / MODEL).is_file():
            return _from_model(folder / MODEL, chat=chat, tower=tower, vocab=vocab)
    raise CheckpointError(
        f"has no {MODEL} beside it",
        where=str(beside[0]),
        remedy="Name the folder of the tokenizer (Kaggle's archive holds tokenizer.model) with --tokenizer FOLDER.",
    )


def _from_folder(folder: Path, *, chat: bool, tower: bool, vocab: int) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        made = _from_model(folder / MODEL, chat=chat, tower=tower, vocab=vocab)
        files = [f for f in companion_files(folder) if not f.name.startswith("_") and f.name != "commit_success.txt"]
        names = {f.name for f in files}
        written = {n: c for n, c in made.written.items() if n not in names}
        return Tokenizer(companions=files, written=written, notes=made.notes)
    return Tokenizer(companions=list(companion_files(folder)))


def _from_model(file: Path, *, chat: bool, tower: bool, vocab: int) -> Tokenizer:
    return Tokenizer(
        companions=[file, *licence_files(file.parent)],
        written=_written(file, chat=chat, tower=tower, vocab=vocab),
        notes=[f"tokenizer.json, the list of special tokens and the chat template are made from {file.name} alone"],
    )


def _written(file: Path, *, chat: bool, tower: bool, vocab: int) -> dict[str, bytes]:
    """The files that transformers wants, out of the SentencePiece model."""
    model = read_sentencepiece(file)
    missing = [t for t in SPECIAL if t not in model.pieces]
    if not model.is_bpe or not model.is_plain or model.adds_space or missing:
        why = f"it has no {missing[0]}" if missing else "it merges or normalises otherwise"
        raise CheckpointError("is not Gemma 3's tokenizer", where=str(file), why=why, remedy="Give --tokenizer FOLDER.")
    if len(model.pieces) > vocab or (tower and len(model.pieces) != vocab):
        raise CheckpointError(
            f"has {len(model.pieces)} tokens, and the checkpoint {vocab}", where=str(file), remedy="Give its own."
        )
    kinds = [CONTROL if p in SPECIAL else k for p, k in zip(model.pieces, model.kinds, strict=True)]
    fields: dict[str, Any] = {
        "ggml.model": "llama",
        "ggml.tokens": list(model.pieces),
        "ggml.scores": model.scores,
        "ggml.token_type": kinds,
        "ggml.add_space_prefix": False,
        "ggml.add_bos_token": True,
        "ggml.bos_token_id": model.pieces.index("<bos>"),
        "ggml.eos_token_id": model.pieces.index("<eos>"),
        "ggml.unknown_token_id": model.unknown_id,
        "ggml.padding_token_id": model.pieces.index("<pad>"),
    }
    if tower:  # its id is the first of the padding rows
        fields["ggml.tokens"] = [*model.pieces, IMAGE_TOKEN]
        fields["ggml.scores"] = [*model.scores, 0.0]
        fields["ggml.token_type"] = [*kinds, CONTROL]
    files = tokenizer_files({f"tokenizer.{k}": v for k, v in fields.items()}, UNLIMITED, str(file))
    config = json.loads(files["tokenizer_config.json"])
    config |= {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "GemmaTokenizer"}
    if tower:
        pictures = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": IMAGE_TOKEN}
        config |= {"extra_special_tokens": pictures, "processor_class": "Gemma3Processor", **pictures}
    files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    if chat:
        files["chat_template.jinja"] = TEMPLATE.encode()
    return files
