"""Runs a script with the interpreter of vLLM's own environment, and what it should have found.

The environment is ``.envs/vllm`` (``envs/make.sh vllm``, or ``make test-vllm``), or the one of the interpreter that
``HALFBYTE_VLLM_PYTHON`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIMEOUT_S = 1800


def python() -> Path | None:
    """The interpreter of vLLM's environment, ``None`` where there is none."""
    named = os.environ.get("HALFBYTE_VLLM_PYTHON")
    path = Path(named) if named else ROOT / ".envs/vllm/bin/python"
    return path if path.exists() else None


MISSING = (
    "vLLM has no environment here (.envs/vllm): make it with `envs/make.sh vllm`, or name its interpreter in "
    "HALFBYTE_VLLM_PYTHON"
)


def ask(script: str, question: Any, folder: Path) -> Any:
    """The answer of ``tests/engines/SCRIPT`` to a question, both JSON. Its output goes to ``FOLDER/SCRIPT.log``."""
    interpreter = python()
    assert interpreter is not None, MISSING
    asked, answered, log = (folder / f"{script}.{end}" for end in ("ask.json", "answer.json", "log"))
    asked.write_text(json.dumps(question))
    answered.unlink(missing_ok=True)
    # vLLM's environment is another one: nothing of this one's path may reach it.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")}
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [interpreter, HERE / script, asked, answered],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                timeout=TIMEOUT_S,
                check=False,
            )
            end = f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"took longer than {TIMEOUT_S} s"
    if not answered.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise AssertionError(f"{script} {end} and left no answer:\n{tail}")
    return json.loads(answered.read_text())  # with a part of the answers where it ended early
