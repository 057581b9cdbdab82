"""Leaving a card in a checkpoint's folder, and sending the folder to the hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, OutputError
from halfbyte.evaluation_records import EVAL_NAME
from halfbyte.records import BENCH_NAME, COMPARE_NAME, CONVERT_NAME, MANIFEST_NAME, VERIFY_NAME, read_json

RESULTS_FOLDER = ".eval_results"
RESULTS_MARK = "# Written by halfbyte card from eval.json.\n"
RECORDS = (MANIFEST_NAME, VERIFY_NAME, COMPARE_NAME, CONVERT_NAME, EVAL_NAME, BENCH_NAME)
# Samples, and weights that a deployment holds again.
NOT_PUSHED = ["eval/*", "*.tmp", "deploy/*.safetensors", "deploy/*.gguf"]


def write_card(folder: Path, text: str, results: dict[str, str]) -> None:
    """README.md and ``.eval_results/``; a README.md of somebody else's is kept as README.source.md.

    Results that an earlier card left there and this one has not are deleted.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        readme = folder / "README.md"
        if readme.exists() and "- halfbyte" not in readme.read_text(encoding="utf-8", errors="replace"):
            readme.replace(folder / "README.source.md")
        _replace(readme, text)
        for path in (folder / RESULTS_FOLDER).glob("*.yaml"):
            stale = f"{RESULTS_FOLDER}/{path.name}" not in results
            if stale and path.read_text(encoding="utf-8", errors="replace").startswith(RESULTS_MARK):
                path.unlink()
        for name, content in results.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            _replace(path, content)
    except OSError as e:
        raise OutputError(f"the card cannot be written: {e.strerror}", where=str(folder)) from None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(0o644)
    os.replace(temporary, path)


def push(folder: Path, repo_id: str) -> str:
    """Create the repository where it does not exist and upload the folder; returns its address.

    Samples of evaluations are left out (data sets' licences decide whether those may be published), and so are weights
    under ``deploy/``. Records are sent without the folders that they name.

    Raises:
        HalfbyteError: the hub refuses, or is not reachable.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    records = public_records(folder)
    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[*NOT_PUSHED, *records])
        if records:
            changes = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=t.encode()) for n, t in records.items()]
            api.create_commit(repo_id, operations=changes, commit_message="Add halfbyte's records")
    except Exception as e:  # the hub's client has changed its HTTP library, and with it the errors, several times
        raise HalfbyteError(
            "it could not be uploaded",
            where=repo_id,
            why=f"{type(e).__name__}: {str(e).splitlines()[0][:200]}" if str(e) else type(e).__name__,
            remedy="Check the network, log in with `hf auth login` to an account that may write there, and try again.",
        ) from None
    return f"https://huggingface.co/{repo_id}"


def public_records(folder: Path) -> dict[str, str]:
    """Name -> content of a folder's records that name folders of this machine, without these."""
    found = {}
    for name in RECORDS:
        if (folder / name).is_file():
            record = read_json(folder / name)
            public = without_folders(record)
            if public != record:
                found[name] = json.dumps(public, indent=2, ensure_ascii=False) + "\n"
    return found


def without_folders(value: Any) -> Any:
    """A JSON value in whose strings absolute paths are cut down to their last part."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_folders(v) for v in value]
    return re.sub(r"(?<![\w.:/~])(?:/[^\s/\"',]+)+/([^\s/\"',]+)", r"\1", value) if isinstance(value, str) else value
