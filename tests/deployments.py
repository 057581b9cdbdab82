"""What tests of ``deploy`` share: how the files that it writes are read."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from halfbyte.deployment.options import TARGETS, Wishes

NAME = "ferry-1b-w4a16"
PVC = "pvc://models/ferry"
# What each target needs besides a checkpoint on this machine.
NEEDED: dict[str, Wishes] = {t: Wishes(storage=PVC) if t in ("kserve", "kubernetes") else Wishes() for t in TARGETS}


def manifest(folder: Path, file: str) -> Any:
    return yaml.safe_load((folder / file).read_text())


def quadlet(folder: Path) -> dict[str, list[str]]:
    """The [Container] section; keys may occur several times."""
    found: dict[str, list[str]] = {}
    text = (folder / f"{NAME}.container").read_text().partition("[Container]")[2].partition("\n[")[0]
    for line in text.splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def instruction(folder: Path, name: str) -> Any:
    line = next(x for x in (folder / "Containerfile").read_text().splitlines() if x.startswith(f"{name} "))
    value = line.removeprefix(f"{name} ")
    return json.loads(value) if value.startswith("[") else value


def called(folder: Path, script: str, *, path: Path, **environment: str) -> list[list[str]]:
    """What a script calls instead of podman, ilab and rsync, which are replaced by something that notes it."""
    path.mkdir(exist_ok=True)
    notes = path / "calls"
    notes.unlink(missing_ok=True)
    for program in ("podman", "ilab", "rsync"):
        (path / program).write_text(f'#!/bin/bash\nprintf "%s\\0" {program} "$@" >> {notes}\necho >> {notes}\n')
        (path / program).chmod(0o755)
    kept = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(path)} | environment
    done = subprocess.run([folder / script], env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in notes.read_text().split("\0\n")[:-1] for line in [line + "\0"]]


def options_of(arguments: list[str]) -> dict[str, str]:
    """``--key=value`` or ``--key value``."""
    joined = " ".join(arguments)
    return dict(re.findall(r"--([\w-]+)[= ]([^\s]+)", joined))
