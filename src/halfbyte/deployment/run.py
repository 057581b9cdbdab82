"""``deploy``: check everything, write everything beside the final folder, then give it its name."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from halfbyte.checkpoint.layout import write_error
from halfbyte.checkpoint.reader import companion_files, companion_name
from halfbyte.checkpoint.source import resolve
from halfbyte.deployment import compose, kserve, kubernetes, podman, rhel_ai, triton
from halfbyte.deployment.memory import check_fits, estimates
from halfbyte.deployment.options import Options, Wishes, check_target, settle
from halfbyte.deployment.subject import Subject, name_for, open_subject
from halfbyte.errors import OutputError, UsageError
from halfbyte.progress import Reporter, Silent
from halfbyte.records import DeployRecord, Estimate, fsync_folder

WRITERS: dict[str, Callable[[Subject, Options, Mapping[str, Estimate]], dict[str, str]]] = {
    "triton": triton.files,
    "kserve": kserve.files,
    "kubernetes": kubernetes.files,
    "podman": podman.files,
    "compose": compose.files,
    "rhel-ai": rhel_ai.files,
}


def deploy(
    target: str,
    checkpoint: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    wishes: Wishes | None = None,
    reporter: Reporter | None = None,
) -> DeployRecord:
    """Write the files that put a checkpoint into service.

    Args:
        target: one of :data:`halfbyte.deployment.options.TARGETS`.
        checkpoint: a folder in any format, a GGUF file, or a hub id.
        out: a folder that does not exist yet.
        name: under which the model is deployed and called; made of the checkpoint's name by default.
        wishes: everything else.
        reporter: listener for progress (weights that are copied or converted).

    Returns:
        What was written and settled, with the reckoning of memory.

    Raises:
        UsageError: options contradict each other, the target or the checkpoint; nothing was written.
        CheckpointError: the checkpoint is missing, broken or not loadable.
        OutputError: OUT exists or cannot be written.
    """
    reporter, wishes, out = reporter or Silent(), wishes or Wishes(), Path(out)
    check_target(target)
    if out.exists():
        raise OutputError(
            "exists already", where=str(out), remedy="Choose another folder, or remove this one; it is left untouched."
        )
    subject = open_subject(checkpoint)
    options = settle(target, subject, name_for(subject.source, name), wishes)
    found = estimates(subject, options)
    check_fits(found, options, wishes.gpu_memory_gb)
    texts = WRITERS[target](subject, options, found)
    notes = list(subject.notes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as e:
        raise write_error(e, out, 0) from None
    try:
        for file, text in texts.items():
            write_text(partial / file, text)
        if target == "triton":
            notes += place_weights(partial / triton.checkpoint_folder(options), subject, options, reporter)
        os.chmod(partial, 0o755)
        os.rename(partial, out)
        fsync_folder(out.parent)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_error(e, out, subject.weights_bytes if target == "triton" else 0) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return DeployRecord(
        target=target,
        name=options.name,
        source=subject.source,
        format=subject.format,
        engine=options.engine,
        port=triton.HTTP_PORT if target == "triton" else options.port,
        context=options.context,
        estimates=found,
        files={file: hashlib.sha256(text.encode()).hexdigest() for file, text in sorted(texts.items())},
        notes=notes,
    )


def write_text(path: Path, text: str) -> None:
    """A file that everybody may read; scripts may be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755 if path.suffix == ".sh" else 0o644)


def place_weights(folder: Path, subject: Subject, options: Options, reporter: Reporter) -> list[str]:
    """Put the checkpoint where Triton's model looks for it; returns notes for the user."""
    place, unconverted = triton.checkpoint_folder(options), options.engine == "llamacpp" and subject.gguf is None
    if options.weights == "none":
        folder.mkdir(parents=True)
        files = "the files of its GGUF (`halfbyte convert --to gguf`)" if unconverted else "the checkpoint's files"
        return [f"put {files} into {place}, or mount them there"]
    if unconverted:
        from halfbyte.conversion.run import convert

        record = convert(subject.source, folder, to="gguf", reporter=reporter)
        return list(record.notes)
    folder.mkdir(parents=True)
    origin = subject.folder or resolve(subject.source)
    if subject.gguf is not None:
        chosen = [origin / part for part in subject.parts]
    else:
        chosen = [origin / "config.json", *companion_files(origin), *sorted(origin.glob("*.safetensors"))]
        chosen += list(origin.glob("*.safetensors.index.json"))
    extra = [origin / "generation_config.json"] if subject.gguf is not None else []
    reporter.start("placing the weights", len(chosen))
    for file in dict.fromkeys([*chosen, *(p for p in extra if p.exists())]):
        target = folder / companion_name(file)
        target.parent.mkdir(exist_ok=True)
        _place(file.resolve(), target, options.weights)
        reporter.advance()
    reporter.finish()
    return []


def _place(file: Path, target: Path, how: str) -> None:
    if how == "copy":
        shutil.copyfile(file, target)
        target.chmod(0o644)
        return
    try:
        os.link(file, target)
    except OSError as e:
        raise UsageError(
            f"{file.name} cannot be linked: {e.strerror}",
            where="--weights link",
            remedy="Links need one file system for both; use --weights copy.",
        ) from None
