"""From a checkpoint's name to an engine that could be started: read it, choose, convert where the engine wants that.

That needs torch and transformers, which take 200 MB that whoever waits for requests has no use for.
:func:`prepare_apart` does it in a process that ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.errors import (
    CheckpointError,
    EngineError,
    HalfbyteError,
    MissingDependencyError,
    OutputError,
    ResumeError,
    UsageError,
)
from halfbyte.progress import Reporter
from halfbyte.serving import engines
from halfbyte.serving.child import TIED
from halfbyte.serving.choice import NAMES, Choice, Served, choose, read_served
from halfbyte.serving.engines import Launch, Wishes
from halfbyte.serving.machine import Machine, look, need

CACHE_NAME = ".halfbyte"
MODEL_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
STOP_GRACE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An engine chosen for a checkpoint, and how it is started.

    Attributes:
        choice: with its reason; launch: the process.
        name: of the engine, in words.
        context: tokens of a sequence; pictures: whether it shows them to the model.
        notes: what a user ought to know.
    """

    choice: Choice
    launch: Launch
    name: str
    context: int
    pictures: bool
    notes: list[str] = field(default_factory=list)


def prepare_apart(
    checkpoint: str | Path, *, engine: str, wishes: Wishes, cache: Path | None, reporter: Callable[[], Reporter]
) -> Prepared:
    """:func:`prepare` in a process of its own, which ends with it, or with this one.

    Args:
        reporter: makes one there; a function of a module.

    Raises:
        HalfbyteError: as :func:`prepare`; EngineError: the process was killed.
    """
    asked = pickle.dumps((checkpoint, engine, wishes, cache, reporter))
    answering = ("-c", "from halfbyte.serving.prepare import answer_parent; answer_parent()")
    with subprocess.Popen(
        [sys.executable, "-c", TIED, str(os.getpid()), *answering],
        # It imports what this process would: -c and -m alone put the current folder first.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the other
    ) as process:
        try:
            answer, _ = process.communicate(asked)
        except BaseException:
            process.terminate()
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_GRACE_S)
            finally:
                process.kill()
            raise
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise EngineError(
            f"the process that reads it was killed by {name}",
            where=str(checkpoint),
            why="the system may have run out of memory" if name == "SIGKILL" else "",
        )
    if process.returncode:
        raise RuntimeError(f"preparing ended with status {process.returncode}; its own traceback is above")
    found = pickle.loads(answer)
    if isinstance(found, HalfbyteError):
        raise found
    assert isinstance(found, Prepared)
    return found


def answer_parent() -> None:
    """The other end of :func:`prepare_apart`: what it asked on standard input, answered on standard output.

    SIGTERM removes what is unfinished and ends it.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print, those in C too, must not get into the answer
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found: Prepared | HalfbyteError
    try:
        checkpoint, engine, wishes, cache, reporter = pickle.load(sys.stdin.buffer)
        progress = reporter()
        try:
            found = prepare(checkpoint, engine=engine, wishes=wishes, cache=cache, reporter=progress)
        except HalfbyteError as e:
            found = e
        finally:
            progress.finish()
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    with answers:
        answers.write(pickle.dumps(found))


def prepare(checkpoint: str | Path, *, engine: str, wishes: Wishes, cache: Path | None, reporter: Reporter) -> Prepared:
    """Choose an engine and make what it reads.

    Args:
        checkpoint: folder, hub id or GGUF file.
        engine: ``auto`` or a name.
        wishes: of the user.
        cache: folder for converted checkpoints; ``None`` for :data:`CACHE_NAME` beside the checkpoint.
        reporter: for progress.

    Raises:
        HalfbyteError: nothing can run it, before anything is started.
    """
    need("aiohttp", "serve", "serving")
    machine, served = look(), read_served(checkpoint)
    choice = choose(engine, served, machine, gguf_obstacle=None)
    engines.check_wishes(choice.engine, wishes, served, machine)
    if choice.engine == "llamacpp":
        try:
            return _llamacpp(choice, served, wishes, machine, cache, reporter)
        except (UsageError, CheckpointError, MissingDependencyError) as e:
            if engine != "auto" or served.method == "gguf" or isinstance(e, ResumeError):
                raise
            choice = choose(engine, served, machine, gguf_obstacle=f"it cannot become GGUF: {e}")
            engines.check_wishes(choice.engine, wishes, served, machine)
    tokens = wishes.tokens(served)
    notes: list[str] = []
    if choice.engine == "vllm":
        launch, pictures = engines.vllm(served, wishes, machine), served.pictures
    else:
        path, notes = _readable(served, cache, reporter)
        launch, pictures = engines.transformers(path, served, wishes), False
    return Prepared(
        choice=choice, launch=launch, name=NAMES[choice.engine], context=tokens, pictures=pictures, notes=notes
    )


def _llamacpp(
    choice: Choice, served: Served, wishes: Wishes, machine: Machine, cache: Path | None, reporter: Reporter
) -> Prepared:
    from halfbyte.conversion.gguf_cache import to_gguf
    from halfbyte.serving.gguf_embeddings import with_small_embeddings

    if served.method == "gguf":
        if wishes.embeddings != "as-is":
            raise UsageError("is for checkpoints", where="--embeddings", remedy="A GGUF file is served as it is.")
        model, mmproj = _gguf_files(served.path)
        notes: list[str] = []
    else:
        made = to_gguf(served.path, cache_folder(served.path, cache), reporter=reporter)
        model, mmproj, notes = made.model, made.mmproj, list(made.record.notes)
        reporter.say(f"GGUF: {made.folder}")
        if wishes.embeddings == "q8_0":
            model = with_small_embeddings(model, reporter)
    return Prepared(
        choice=choice,
        launch=engines.llamacpp(model, mmproj, served, wishes, machine),
        name=NAMES[choice.engine],
        context=wishes.tokens(served),
        pictures=mmproj is not None,
        notes=notes,
    )


def _gguf_files(path: Path) -> tuple[Path, Path | None]:
    if path.is_file():
        return path, None
    models = [f for f in sorted(path.glob("*.gguf")) if "mmproj" not in f.name]
    model = path / MODEL_FILE if path / MODEL_FILE in models else models[0] if models else None
    if model is None:
        raise CheckpointError("holds no language model", where=str(path), remedy="Name a GGUF file.")
    mmproj = path / VISION_FILE
    return model, mmproj if mmproj.exists() else None


def _readable(served: Served, cache: Path | None, reporter: Reporter) -> tuple[Path, list[str]]:
    """A folder that halfbyte.load reads: the checkpoint itself, or a dense copy of formats that it does not."""
    from halfbyte.conversion.gguf_cache import folder_for
    from halfbyte.conversion.run import convert

    if served.method in ("none", "compressed-tensors"):
        return served.path, []
    source, folder = served.path.resolve(), cache_folder(served.path, cache)
    dense = folder_for(source, folder, "dense")
    if not dense.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = dense.with_name(dense.name + ".partial").exists()
        convert(source, dense, to="dense", resume=unfinished, reporter=reporter)
    return dense, [f"transformers reads a dense copy: {dense}"]


def cache_folder(checkpoint: Path, wanted: Path | None) -> Path:
    """Where converted checkpoints go: beside the checkpoint, or, where nothing can be written, to the user's cache.

    Raises:
        OutputError: the folder wanted cannot be written to.
    """
    if wanted is not None:
        try:
            wanted.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"cannot be made: {e.strerror}", where=str(wanted)) from None
        return wanted
    beside = checkpoint.resolve().parent
    if os.access(beside, os.W_OK):
        return beside / CACHE_NAME
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "halfbyte"
