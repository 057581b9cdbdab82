"""llama.cpp, asked from outside, and what transformers says to the same question.

llama.cpp runs in a process of its own (llamacpp_run.py), with the interpreter that ``HALFBYTE_LLAMACPP_PYTHON`` names
or, where it has the package xllamacpp, this one.

On a CPU llama.cpp multiplies quantised weights by inputs that it has rounded to 8 bits, 32 at a time. That moves logits
a thousand times further than anything a conversion could get wrong in the last digit, so the expectation is computed
with inputs rounded the same way (:func:`round_inputs`): then both agree to float32's own noise. What is left is
GELU, of which llama.cpp takes a table in float16 (Gemma), and Q4_1's sums, which it rounds to float16; a changed last
bit there can tip the rounding of an input.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
TIMEOUT_S = 300
MISSING = "llama.cpp is not here: pip install xllamacpp, or name an interpreter that has it in HALFBYTE_LLAMACPP_PYTHON"


def python() -> str | None:
    """An interpreter that has xllamacpp, ``None`` where there is none."""
    named = os.environ.get("HALFBYTE_LLAMACPP_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("xllamacpp") else None)


def ask(model: Path, folder: Path, **question: Any) -> dict[str, Any]:
    """llama.cpp's answer about a GGUF file; see llamacpp_run.py for what can be asked."""
    interpreter = python()
    assert interpreter is not None, MISSING
    asked, answered = folder / "ask.json", folder / "answer.json"
    asked.write_text(json.dumps({"model": str(model), **question}))
    answered.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [interpreter, HERE / "llamacpp_run.py", asked, answered],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
    )
    if not answered.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise AssertionError(f"llama.cpp ended with {done.returncode} before it answered:\n{tail}")
    found: dict[str, Any] = json.loads(answered.read_text())
    return found


def next_tokens(answer: dict[str, Any], vocab_size: int) -> torch.Tensor:
    """Log probabilities after each prefix, ``[prefixes, vocab_size]``; NaN where llama.cpp did not list a token."""
    out = torch.full((len(answer["next"]), vocab_size), float("nan"))
    for row, listed in zip(out, answer["next"], strict=True):
        ids, values = zip(*listed, strict=True)
        row[torch.tensor(ids)] = torch.tensor(values)
    return out


def round_inputs(model: torch.nn.Module, modules: Collection[str]) -> None:
    """Let Linears see their inputs as llama.cpp's kernels for quantised weights do (``quantize_row_q8_0``).

    For 32 values x: ``d = max|x| / 127``, codes ``round(x / d)``, times d in float16.
    """
    found = 0
    for name, module in model.named_modules():
        if name in modules:
            module.register_forward_pre_hook(_round)
            found += 1
    assert found == len(modules) > 0


def _round(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    blocks = args[0].float().unflatten(-1, (-1, 32))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / d.clamp_min(1e-30)).round()
    return ((codes * d.half().float()).flatten(-2), *args[1:])
