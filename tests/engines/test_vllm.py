"""Tiny checkpoints in vLLM on this CPU: they load, generate, and predict what their codes and scales stand for. W8A8 of
every family, packed 4 bits and mixed precision of one.

One process of vLLM runs all models, since its start is what costs. ``-k NAME`` builds and runs the chosen ones alone.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from halfbyte.serving.choice import read_served, vllm_obstacle
from halfbyte.serving.machine import Machine, Vllm, cpu_flags

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(engine.python() is None, reason=engine.MISSING),
    pytest.mark.filterwarnings("ignore:Casting complex values"),  # transformers' Llama 4, when it is made
]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TOP = 16, 6, 4, 5
EVERY = pytest.mark.parametrize("family", cases.CASES)


@dataclass(frozen=True)
class Packed:
    """How a llama with packed weights is made; ``wide``: vLLM gets :mod:`vllm_wide`."""

    options: Mapping[str, Any]
    wide: bool = False


MIXED = {"scheme": "W4A16", "group_size": 32, "target_bits": 6.0}
PACKED = {
    "W4A16": Packed({"scheme": "W4A16", "group_size": 32}),
    "W4A16 by rows": Packed({"scheme": "W4A16", "group_size": "channel"}),
    "W4A16_ASYM": Packed({"scheme": "W4A16_ASYM", "group_size": 64}),
    "W4A8": Packed({"scheme": "W4A8", "group_size": 32}),
    "mixed": Packed(MIXED, wide=True),
    "mixed, vLLM alone": Packed(MIXED),
}
AVX512 = "avx512f" in cpu_flags(Path("/proc/cpuinfo"))
needs_avx512 = pytest.mark.skipif(not AVX512, reason="vLLM's kernel for 4 bits on CPUs needs AVX512")


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
    """Every chosen family and way of packing, quantised by halfbyte, and what vLLM answers for it."""
    root = tmp_path_factory.mktemp("vllm")
    text = root / "ferry.txt"
    text.write_text(tiny.TEXT, encoding="utf-8")
    asking = [i.callspec.params for i in request.session.items if "made" in getattr(i, "fixturenames", ())]
    chosen = [p["packed"] if "packed" in p else p["family"] for p in asking if AVX512 or "packed" not in p]
    folders, jobs, failed = {}, [], {}
    for name in dict.fromkeys(chosen):
        packed = PACKED.get(name)
        family = name if packed is None else "llama"
        case = cases.CASES[family]
        source, out = case.build(family, root / name), root / f"{name}, quantised"
        options: dict[str, Any] = {"samples": 4, "seq_len": 40, "effort": "low", "device": "cpu"}
        options |= {"scheme": "W8A8"} if packed is None else packed.options
        seen = None if packed is not None or case.picture is None else pictured(source, case.picture)
        folders[name] = (source, out, seen)
        try:
            halfbyte.quantize(source, out, calibration=f"text:{text}", **options)
        except HalfbyteError as e:
            failed[name] = {"error": f"halfbyte: {e}"}
            continue
        asked: list[Any] = list(prompts(source))
        asked += [] if seen is None else [{"text": seen[0], "images": [str(seen[1])]}]
        job = {"name": name, "folder": str(out), "prompts": asked, "new_tokens": NEW_TOKENS, "top": TOP}
        jobs.append(job | ({} if packed is None else {"options": {"dtype": "float16"}, "wide": packed.wide}))
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


@needs_avx512
@pytest.mark.parametrize("packed", [name for name in PACKED if name != "mixed, vLLM alone"])
def test_packed_weights_predict_what_they_stand_for(made: dict[str, Made], packed: str, tmp_path: Path) -> None:
    """Inputs are not rounded, so there are no ties, and every prompt must be right.

    vLLM's kernel takes no float32, so it computes in float16; symmetric 4 bits times a bfloat16 scale are exact in it.
    """
    answer, source, out = made[packed].answer, made[packed].source, made[packed].out
    assert "error" not in answer, answer.get("traceback", answer["error"])
    runs = answer["runs"]
    assert [run["prompt_ids"] for run in runs] == prompts(source)
    assert {len(run["ids"]) for run in runs} == {NEW_TOKENS}
    groups = tiny.config_of(out)["quantization_config"]["config_groups"].values()
    assert {g["weights"]["num_bits"] for g in groups} == ({4, 8} if PACKED[packed].wide else {4})
    read = [{"input_ids": torch.tensor([run["prompt_ids"] + run["ids"]])} for run in runs]

    def apart(folder: Path) -> torch.Tensor:
        wanted = expected.predictions(folder, "llama", read, set())
        return torch.cat([differences(run, logits) for run, logits in zip(runs, wanted, strict=True)])

    errors, from_source = apart(expected.dense_copy(source, out, tmp_path / "dense")), apart(source)
    assert errors.max() < 0.01
    assert from_source.mean() > 50 * errors.mean()


@needs_avx512
@pytest.mark.parametrize("packed", ["mixed, vLLM alone"])
def test_mixed_precision_finds_no_kernel_on_a_cpu_and_serving_knows(made: dict[str, Made], packed: str) -> None:
    """Once vLLM has one, :mod:`vllm_wide`, the obstacle in ``serving.choice`` and README can go."""
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in made[packed].answer["traceback"]
    vllm = Vllm(python="python", version="0.32.0", cpu=True)
    machine = Machine(gpus=(), cpu_flags=frozenset({"avx512f"}), vllm=vllm, llamacpp=None, memory_bytes=1 << 34)
    assert vllm_obstacle(read_served(made[packed].out), machine) == "vLLM has no kernel for W8A16 on CPUs"


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
