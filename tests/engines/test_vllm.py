"""Tiny W8A8 checkpoints in vLLM on this CPU: they load, generate, and predict what their codes and scales stand for.

One process of vLLM runs all models, since its start is what costs. To add a family, add a row to :data:`CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
import expected
import halfbyte
import tiny

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(engine.python() is None, reason=engine.MISSING),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TOP = 16, 6, 4, 5
# vLLM's CPU attention takes these head sizes; its experts take widths that divide by 32.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@dataclass(frozen=True)
class Case:
    """A model to build and what to do with it.

    Attributes:
        build: makes the source checkpoint in a folder that does not exist yet.
        quantize: further arguments of :func:`halfbyte.quantize`.
        engine: further arguments of vLLM's ``LLM``.
    """

    name: str
    build: Callable[[Path], Path]
    quantize: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


def text_case(family: str, **options: Any) -> Case:
    return Case(family, lambda folder: tiny.build(folder, family, **SIZES | options))


CASES = [text_case(family) for family in tiny.FAMILIES]


@dataclass(frozen=True)
class Made:
    source: Path
    out: Path
    answer: dict[str, Any]


def prompts(folder: Path) -> list[list[int]]:
    """Short pieces of :data:`tiny.TEXT`. Short, because of ties: where vLLM's and our sums differ in a last bit, an
    input that lies between two int8 codes can go the other way, and what is read later differs visibly."""
    ids = tiny.token_ids(folder, PROMPTS * PROMPT_TOKENS)[0].tolist()
    return [ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids), PROMPT_TOKENS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every case quantised by halfbyte, and what vLLM answers for it."""
    root = tmp_path_factory.mktemp("vllm")
    folders, jobs = {}, []
    for case in CASES:
        source, out = case.build(root / case.name), root / f"{case.name}-W8A8"
        usual: dict[str, Any] = {"scheme": "W8A8", "calibration": "random-tokens", "samples": 8, "seq_len": 32}
        halfbyte.quantize(source, out, **usual | case.quantize)
        folders[case.name] = (source, out)
        jobs.append(
            {
                "name": case.name,
                "folder": str(out),
                "prompts": prompts(source),
                "new_tokens": NEW_TOKENS,
                "top": TOP,
                "options": case.engine,
            }
        )
    answers = engine.ask("vllm_run.py", jobs, root)
    nothing = {"error": "vLLM ended before this model's turn"}
    return {name: Made(source, out, answers.get(name, nothing)) for name, (source, out) in folders.items()}


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_it_loads_and_generates(made: dict[str, Made], name: str) -> None:
    answer = made[name].answer
    assert "error" not in answer, answer.get("traceback", answer["error"])
    assert [len(run["ids"]) for run in answer["runs"]] == [NEW_TOKENS] * PROMPTS
    assert [run["prompt_ids"] for run in answer["runs"]] == prompts(made[name].source)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_it_predicts_what_the_checkpoint_stands_for(made: dict[str, Made], name: str, tmp_path: Path) -> None:
    """Each log-probability that vLLM reports, against the dequantised model with rounded inputs.

    A weight, scale or bias in a wrong place leaves no prompt right. Where the CPU's int8 products saturate (no VNNI),
    only nearness can be asked for.
    """
    answer, source, out = made[name].answer, made[name].source, made[name].out
    assert "error" not in answer, answer["error"]
    runs = answer["runs"]
    read = [run["prompt_ids"] + run["ids"] for run in runs]
    dense = expected.dense_copy(source, out, tmp_path / "dense")
    wanted = expected.predictions(dense, read, expected.quantized_modules(out))
    errors = [differences(run, logits) for run, logits in zip(runs, wanted, strict=True)]
    if not answer["cpu"]["vnni"]:
        assert torch.cat(errors).mean() < 0.5
        return
    right = [i for i, e in enumerate(errors) if exact(e)]
    assert len(right) >= PROMPTS // 2, [round(float(e.max()), 5) for e in errors]
    for i in right:
        assert runs[i]["ids"] == wanted[i][PROMPT_TOKENS - 1 : -1].argmax(-1).tolist(), f"prompt {i}"
    unrounded = expected.predictions(dense, read, set())  # the measure is sharp: this much too little shows everywhere
    assert not any(exact(differences(run, logits)) for run, logits in zip(runs, unrounded, strict=True))


def exact(errors: torch.Tensor) -> bool:
    return bool((errors < 1e-3).all())


def differences(run: dict[str, Any], wanted: torch.Tensor) -> torch.Tensor:
    """``|log p_vllm - log p|`` in nats over all tokens that vLLM names at all positions."""
    tables = [*run["prompt_logprobs"][1:], *run["logprobs"]]
    found = [(i, int(t), p) for i, table in enumerate(tables) for t, p in table.items()]
    positions, tokens, logprobs = zip(*found, strict=True)
    return (wanted[list(positions), list(tokens)] - torch.tensor(logprobs)).abs()
