"""Tiny W8A8 checkpoints in vLLM on this CPU: they load, generate, and predict what their codes and scales stand for.

One process of vLLM runs all models, since its start is what costs. ``-k NAME`` builds and runs the chosen ones alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import cases
import engine
import expected
import halfbyte
import model_records
import pictures
import tiny
import zoo
from halfbyte.calibration.processing import load_processor
from halfbyte.errors import HalfbyteError

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(engine.python() is None, reason=engine.MISSING),
    pytest.mark.filterwarnings("ignore:Casting complex values"),  # transformers' Llama 4, when it is made
]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TOP = 16, 6, 4, 5
EVERY = pytest.mark.parametrize("family", cases.CASES)


@dataclass(frozen=True)
class Made:
    source: Path
    out: Path
    pictured: tuple[str, Path] | None
    answer: dict[str, Any]


def prompts(folder: Path) -> list[list[int]]:
    """Short pieces of :data:`tiny.TEXT`. Short, because of ties: where vLLM's and our sums differ in a last bit, an
    input that lies between two int8 codes can go the other way, and what is read later differs visibly."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(tiny.TEXT).ids[: PROMPTS * PROMPT_TOKENS]
    return [ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids), PROMPT_TOKENS)]


def pictured(source: Path, size: tuple[int, int]) -> tuple[str, Path]:
    """A text with a picture, as the chat template renders it."""
    parts = [{"type": "image"}, {"type": "text", "text": "What is seen?"}]
    text = load_processor(source).tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    return text, pictures.save_picture(source.with_name(f"{source.name}.png"), *size, seed=3)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every chosen family quantised by halfbyte, and what vLLM answers for it."""
    root = tmp_path_factory.mktemp("vllm")
    text = root / "ferry.txt"
    text.write_text(tiny.TEXT, encoding="utf-8")
    chosen = [i.callspec.params["family"] for i in request.session.items if "made" in getattr(i, "fixturenames", ())]
    folders, jobs, failed = {}, [], {}
    for family in dict.fromkeys(chosen):
        case = cases.CASES[family]
        source, out = case.build(family, root / family), root / f"{family}-W8A8"
        options: dict[str, Any] = {"samples": 4, "seq_len": 40, "effort": "low", "device": "cpu"}
        seen = None if case.picture is None else pictured(source, case.picture)
        folders[family] = (source, out, seen)
        try:
            halfbyte.quantize(source, out, scheme="W8A8", calibration=f"text:{text}", **options)
        except HalfbyteError as e:
            failed[family] = {"error": f"halfbyte: {e}"}
            continue
        asked: list[Any] = list(prompts(source))
        asked += [] if seen is None else [{"text": seen[0], "images": [str(seen[1])]}]
        jobs.append({"name": family, "folder": str(out), "prompts": asked, "new_tokens": NEW_TOKENS, "top": TOP})
    answers = failed | engine.ask("vllm_run.py", jobs, root)
    nothing = {"error": "vLLM ended before this model's turn"}
    return {name: Made(*folder, answers.get(name, nothing)) for name, folder in folders.items()}


@EVERY
def test_it_loads_and_generates(made: dict[str, Made], family: str) -> None:
    answer = made[family].answer
    assert "error" not in answer, answer.get("traceback", answer["error"])
    assert {len(run["ids"]) for run in answer["runs"]} == {NEW_TOKENS}
    assert [run["prompt_ids"] for run in answer["runs"][:PROMPTS]] == prompts(made[family].source)


@EVERY
def test_it_predicts_what_the_checkpoint_stands_for(made: dict[str, Made], family: str, tmp_path: Path) -> None:
    """Each log-probability that vLLM reports, against the dequantised model with rounded inputs.

    A weight, scale or bias in a wrong place leaves no prompt right. Where the CPU's int8 products saturate (no VNNI),
    only nearness can be asked for.
    """
    answer, source, out = made[family].answer, made[family].source, made[family].out
    assert "error" not in answer, answer["error"]
    runs = answer["runs"][:PROMPTS]
    read = [{"input_ids": torch.tensor([run["prompt_ids"] + run["ids"]])} for run in runs]
    dense = expected.dense_copy(source, out, tmp_path / "dense")
    wanted = expected.predictions(dense, family, read, expected.quantized_modules(out))
    errors = [differences(run, logits) for run, logits in zip(runs, wanted, strict=True)]
    if not answer["cpu"]["vnni"]:
        assert torch.cat(errors).mean() < 0.5
        return
    right = [i for i, e in enumerate(errors) if exact(e)]
    assert len(right) >= PROMPTS // 2, [round(float(e.max()), 5) for e in errors]
    for i in right:
        assert runs[i]["ids"] == wanted[i][PROMPT_TOKENS - 1 : -1].argmax(-1).tolist(), f"prompt {i}"
    unrounded = expected.predictions(dense, family, read, set())  # a measure so sharp that this much shows everywhere
    assert not any(exact(differences(run, logits)) for run, logits in zip(runs, unrounded, strict=True))
    model_records.passed(family, "W8A8", "vllm", engine=answer["versions"])


@pytest.mark.parametrize("family", [name for name, case in cases.CASES.items() if case.picture])
def test_it_sees(made: dict[str, Made], family: str, tmp_path: Path) -> None:
    """The tower and the projector are as in the source: what follows a picture is what transformers predicts.

    A picture is a long prompt, so ties are likely; but a blind or a wrong tower is further away than rounding is.
    """
    answer, source, out, seen = made[family].answer, made[family].source, made[family].out, made[family].pictured
    assert "error" not in answer, answer["error"]
    assert seen is not None
    text, file = seen
    processor = load_processor(source)
    run = answer["runs"][PROMPTS]
    dense, quantized = expected.dense_copy(source, out, tmp_path / "dense"), expected.quantized_modules(out)

    def after(seed: int) -> torch.Tensor:
        image = pictures.picture(*cases.CASES[family].picture or (), seed=seed)
        values = dict(processor(images=[[image]], text=[text], return_tensors="pt"))
        assert values["input_ids"][0].tolist() == run["prompt_ids"]
        logits = expected.predictions(dense, family, [values], quantized)[0]
        return differences(run | {"logprobs": run["logprobs"][:1]}, logits)

    assert file.exists()
    saw, saw_another = after(3), after(4)
    assert saw[: len(saw) // 4].max() < 1e-3 or saw.mean() < 0.5 * saw_another.mean()
    assert saw.mean() < saw_another.mean()
    model_records.passed(family, "W8A8", "vllm with pictures", engine=answer["versions"])


def exact(errors: torch.Tensor) -> bool:
    return bool((errors < 1e-3).all())


def differences(run: dict[str, Any], wanted: torch.Tensor) -> torch.Tensor:
    """``|log p_vllm - log p|`` in nats over all tokens that vLLM names at all positions."""
    tables = [*run["prompt_logprobs"][1:], *run["logprobs"]]
    found = [(i, int(t), p) for i, table in enumerate(tables) for t, p in table.items()]
    positions, tokens, logprobs = zip(*found, strict=True)
    return (wanted[list(positions), list(tokens)] - torch.tensor(logprobs)).abs()


def test_every_family_of_the_zoo_is_here_or_not_for_a_reason() -> None:
    assert zoo.FAMILIES.keys() - cases.CASES.keys() == cases.NOT_IN_VLLM.keys()
    for family, reason in cases.NOT_IN_VLLM.items():
        model_records.passed(family, "W8A8", "vllm", reason)
