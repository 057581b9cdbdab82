"""What a result belongs to: a checkpoint by its bytes, a task by its configuration and documents, an engine by name.

lm-eval's own cache of responses knows none of these, so two models that share a cache file answer for each other.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import Checkpoint, combined_digest, digest_of

# Files beside the tensors that change what a model answers; records, cards and licences do not.
SHAPING = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "tekken.json",
)


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """sha256 over tensors, tokenizer, chat template and configuration."""
    digests = {f"tensor {name}": digest_of(checkpoint.read(name)) for name in checkpoint.tensors}
    for file in sorted(checkpoint.path.iterdir()):
        if file.is_file() and (file.name in SHAPING or file.name.startswith("tokenizer")):
            digests[f"file {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return combined_digest(digests)


def file_digest(path: Path) -> str:
    """sha256 of one file, such as a GGUF."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def task_digest(configs: Mapping[str, Any], documents: Mapping[str, Iterable[Any]], settings: Mapping[str, Any]) -> str:
    """sha256 of tasks' configurations, the documents that are asked, in order, and how they are asked.

    Args:
        configs: task name -> lm-eval's configuration of it; documents: task name -> documents.
        settings: shots, chat template, limit and so on.
    """
    total = hashlib.sha256(plain({"configs": configs, "settings": settings}).encode())
    for name in sorted(documents):
        for document in documents[name]:
            total.update(plain([name, document]).encode())
    return total.hexdigest()


def plain(value: Any) -> str:
    """JSON whose text depends on the value alone."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_stand_in)


def _stand_in(value: Any) -> Any:
    """What stands for a value that JSON has no form for: bytes and pictures by their contents, functions by source."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tobytes") and hasattr(value, "size"):
        return f"{value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):  # built in, or an object that can be called
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return str(value)
