"""Where a checkpoint comes from: a folder, or a hub id that is fetched into the Hugging Face cache.

Only safetensors, JSON, tokenizer files and README.md (a card takes the licence from it) are fetched: never pickles,
never code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from halfbyte.checkpoint.reader import SINGLE_NAME, Checkpoint, TensorInfo, header_tensors, open_checkpoint
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.records import read_json

T = TypeVar("T")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
JSON_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
FETCHED_PATTERNS = (*JSON_PATTERNS, "README.md", "*.safetensors")


def resolve(name: str | Path) -> Path:
    """The local folder of a checkpoint: ``name`` itself when it is one, else the hub snapshot, downloaded if needed."""
    path = Path(name)
    if path.is_dir() or not _is_hub_id(name):
        _require_folder(path)
        return path
    from huggingface_hub import snapshot_download

    return Path(_hub(str(name), lambda: snapshot_download(str(name), allow_patterns=list(FETCHED_PATTERNS))))


def open_headers(name: str | Path, found: list[HalfbyteError] | None = None) -> Checkpoint:
    """Config and tensor headers of a checkpoint without its weights; for a hub id only the headers are fetched.

    ``found`` takes problems of the weight files, see :func:`halfbyte.checkpoint.reader.open_checkpoint`.
    """
    path = Path(name)
    if path.is_dir() or not _is_hub_id(name):
        _require_folder(path)
        return open_checkpoint(path, str(name), found)
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    repo = str(name)
    folder = Path(_hub(repo, lambda: snapshot_download(repo, allow_patterns=list(JSON_PATTERNS))))
    metadata = _hub(repo, lambda: get_safetensors_metadata(repo))
    tensors: dict[str, TensorInfo] = {}
    for file, header in metadata.files_metadata.items():
        entries = {
            n: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
            for n, t in header.tensors.items()
        }
        tensors.update({t.name: t for t in header_tensors(entries, file or SINGLE_NAME, data_start=0)})
    return Checkpoint(path=folder, name=repo, config=read_json(folder / "config.json"), tensors=tensors)


def _is_hub_id(name: str | Path) -> bool:
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(
            "there is no such folder" if not path.is_file() else "is a file, not a checkpoint folder",
            where=str(path),
            remedy="Give a checkpoint folder, or a hub id such as org/name.",
        )


def _hub(name: str, call: Callable[[], T]) -> T:
    """Run a hub call; what can go wrong becomes one clear error."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return call()
    except GatedRepoError:
        raise CheckpointError(
            "access to this model must be granted by its owner",
            where=name,
            remedy="Accept its terms on the hub and log in with `hf auth login`.",
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            "there is neither such a folder nor such a model on the hub",
            where=name,
            remedy="Check the spelling; a private model needs `hf auth login`.",
        ) from None
    except Exception as e:  # the hub's client has changed its HTTP library, and with it the errors, several times
        raise CheckpointError(
            f"is no local folder, and the hub cannot be reached: {type(e).__name__}",
            where=name,
            remedy="Check the network, or give the folder of a downloaded checkpoint.",
        ) from None
