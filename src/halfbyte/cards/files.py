"""Leaving a card in a checkpoint's folder, and sending the folder to the hub."""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte.errors import HalfbyteError, OutputError


def write_card(folder: Path, text: str, results: dict[str, str]) -> None:
    """README.md and ``.eval_results/``; a README.md of somebody else's is kept as README.source.md.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        readme = folder / "README.md"
        if readme.exists() and "- halfbyte" not in readme.read_text(encoding="utf-8", errors="replace"):
            readme.replace(folder / "README.source.md")
        _replace(readme, text)
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

    Samples of evaluations are left out: data sets' licences decide whether those may be published.

    Raises:
        HalfbyteError: the hub refuses, or is not reachable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=["eval/*", "*.tmp"])
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as e:
        raise HalfbyteError(
            "it could not be uploaded",
            where=repo_id,
            why=str(e).splitlines()[0][:200] if str(e) else type(e).__name__,
            remedy="Log in with `hf auth login` to an account that may write there, and try again.",
        ) from None
    return f"https://huggingface.co/{repo_id}"
