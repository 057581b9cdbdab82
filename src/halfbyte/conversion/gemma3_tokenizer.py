"""The tokenizer that belongs to a Flax checkpoint: the user's folder, or the SentencePiece model that lies beside it.

Kaggle's archives hold a ``tokenizer.model`` and nothing else that is not weights. transformers builds a tokenizer from
that, but does not know which tokens are special, that a text begins with one, nor how a chat is written. Those are
facts about Gemma 3 (ai.google.dev/gemma/docs/core/prompt-structure) and are written here, in our words. Who wants the
files that Google publishes for Hugging Face gives their folder with ``--tokenizer``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import companion_files
from halfbyte.errors import CheckpointError, UsageError

MODEL = "tokenizer.model"
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


def find_tokenizer(given: Path | None, beside: Sequence[Path], *, chat: bool, tower: bool) -> Tokenizer:
    """The files that a converted checkpoint gets.

    Args:
        given: what the user named: a folder, or a ``tokenizer.model``.
        beside: folders to look into otherwise.
        chat: whether a chat template belongs to it.
        tower: whether there are pictures, which have a token of their own.

    Raises:
        UsageError: ``given`` holds no tokenizer.
        CheckpointError: there is none beside the checkpoint either.
    """
    if given is not None:
        if given.is_file() and given.suffix == ".model":
            return _from_model(given, chat=chat, tower=tower)
        if given.is_dir() and any((given / n).is_file() for n in KNOWN):
            return _from_folder(given, chat=chat, tower=tower)
        raise UsageError(f"holds no tokenizer ({' or '.join(KNOWN)})", where=f"--tokenizer {given}")
    for folder in beside:
        if (folder / "tokenizer.json").is_file():
            return _from_folder(folder, chat=chat, tower=tower)
        if (folder / MODEL).is_file():
            return _from_model(folder / MODEL, chat=chat, tower=tower)
    raise CheckpointError(
        f"has no {MODEL} beside it",
        where=str(beside[0]),
        remedy="Name the folder of the tokenizer (Kaggle's archive holds tokenizer.model) with --tokenizer FOLDER.",
    )


def _from_folder(folder: Path, *, chat: bool, tower: bool) -> Tokenizer:
    files = [f for f in companion_files(folder) if not f.name.startswith("_") and f.name != "commit_success.txt"]
    names = {f.name for f in files}
    if names.isdisjoint({"tokenizer_config.json", "tokenizer.json"}):
        made = _written(chat=chat, tower=tower)
        return Tokenizer(companions=files, written={n: c for n, c in made.items() if n not in names})
    return Tokenizer(companions=files)


def _from_model(file: Path, *, chat: bool, tower: bool) -> Tokenizer:
    licence = [
        f for f in sorted(file.parent.iterdir()) if f.is_file() and f.stem.upper() in ("LICENSE", "LICENCE", "NOTICE")
    ]
    return Tokenizer(
        companions=[file, *licence],
        written=_written(chat=chat, tower=tower),
        notes=[f"special tokens and chat template are halfbyte's; {file.name} alone was there"],
    )


def _written(*, chat: bool, tower: bool) -> dict[str, bytes]:
    config: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }
    if tower:
        pictures = {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        }
        config |= {"extra_special_tokens": pictures, "processor_class": "Gemma3Processor", **pictures}
    files = {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if chat:
        files["chat_template.jinja"] = TEMPLATE.encode()
    return files
