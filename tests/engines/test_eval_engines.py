"""`halfbyte eval` through llama.cpp and vLLM: the same questions get the answers that transformers gives.

llama.cpp runs in this process (marker ``llamacpp``, and ``evaluation``); vLLM in its own environment (``engine``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import engine
import tiny
from conftest import Models
from halfbyte.conversion.run import convert
from halfbyte.progress import Silent

QUESTIONS = [
    ("The ferry that crosses the", " bay"),
    ("The ferry that crosses the", " seventeen fathoms by the red buoy"),
    ("In spring the ice breaks with a sound like", " cannon; in autumn"),
    ("", "There are forty seats below"),
]


def requests(kind: str, questions: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=q, idx=i) for i, q in enumerate(questions)]


@pytest.mark.evaluation
@pytest.mark.llamacpp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_llama_cpp_answers_as_transformers_does(family: str, tiny_model: Models, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("xllamacpp")
    from halfbyte.evaluation.backends import Backend
    from halfbyte.evaluation.llamacpp import LlamaCppLM

    folder = tiny_model(family, hidden_size=64, intermediate_size=128)
    convert(folder, tmp_path / "kept", to="gguf", dtype="float32")
    opened = Backend(device="cpu").open(folder, baseline=False, pictures=False, kept=tmp_path / "x", reporter=Silent())
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = [(q, dict(options)) for q, _ in QUESTIONS[:3]]
    with opened as reference:
        expected = reference.loglikelihood(requests("loglikelihood", QUESTIONS))
        texts = reference.generate_until(requests("generate_until", prompts))
    with contextlib.closing(LlamaCppLM(tmp_path / "kept/model.gguf", folder, max_length=256, threads=1)) as lm:
        found = lm.loglikelihood(requests("loglikelihood", QUESTIONS))
        assert lm.generate_until(requests("generate_until", prompts)) == texts
    for (value, greedy), (right, right_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(right, abs=2e-2)
        assert greedy == right_greedy


@pytest.mark.evaluation
@pytest.mark.llamacpp
@pytest.mark.filterwarnings("ignore")
def test_llama_cpp_scores_a_quantised_checkpoint_that_it_converts_and_keeps(tiny_model: Models, tmp_path: Path) -> None:
    """From nothing, as a user starts it: both are converted, the checkpoint's codes stay packed, and both are kept."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("xllamacpp")
    import halfbyte
    from halfbyte.evaluation.backends import Backend
    from halfbyte.evaluation.run import evaluate

    base, small = tiny_model("llama", hidden_size=64, intermediate_size=128), tmp_path / "small"
    halfbyte.quantize(base, small, scheme="W4A16", group_size=32, method="rtn")
    options = {"baseline": base, "suite": ["halfbyte_opposites"], "limit": 8, "cache": tmp_path / "cache"}
    packed = evaluate(small, backend=Backend(name="llamacpp", arguments={"max_length": 128}), **options)
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("model.gguf")}
    assert len(kept) == 2
    dense = evaluate(small, backend=Backend(device="cpu"), out=tmp_path / "dense", **options)
    (one,), (other,) = packed.tasks, dense.tasks
    sides = [
        [json.loads(line)["response"] for line in (folder / row.samples["checkpoint"]).read_text().splitlines()]
        for folder, row in ((small, one), (tmp_path / "dense", other))
    ]
    assert len(sides[0]) == 8
    for packed_answer, dense_answer in zip(*sides, strict=True):
        for (value, _), (right, _) in zip(packed_answer, dense_answer, strict=True):
            assert value == pytest.approx(right, abs=0.02 * abs(right) + 0.05)  # inputs of Q4_0 products have 8 bits
    evaluate(small, backend=Backend(name="llamacpp", arguments={"max_length": 128}), resume=False, **options)
    assert kept == {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("model.gguf")}


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(engine.python() is None, reason=engine.MISSING)
def test_vllm_in_its_own_environment_scores_what_it_serves(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from halfbyte.evaluation.backends import Backend
    from halfbyte.evaluation.run import evaluate

    monkeypatch.setenv("HALFBYTE_VLLM_PYTHON", str(engine.python()))
    for name in ("base", "other"):
        shutil.copytree(tiny_model("llama", **tiny.WIDE), tmp_path / name)  # vLLM has no heads of 16
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"comment": "another identity, the same weights"}))
    options = {"suite": ["halfbyte_opposites"], "limit": 6, "cache": tmp_path / "cache"}
    served = evaluate(
        tmp_path / "other",
        baseline=tmp_path / "base",
        backend=Backend(name="vllm", arguments={"max_length": 128}),
        **options,
    )
    plain = evaluate(
        tmp_path / "other", baseline=tmp_path / "base", backend=Backend(device="cpu"), out=tmp_path / "plain", **options
    )
    (one,), (other,) = served.tasks, plain.tasks
    assert one.documents == other.documents == 6
    assert one.recovery is None or one.recovery.value == 100
    sides = [
        [json.loads(line)["response"] for line in (folder / row.samples["base"]).read_text().splitlines()]
        for folder, row in ((tmp_path / "other", one), (tmp_path / "plain", other))
    ]
    for served_answer, plain_answer in zip(*sides, strict=True):
        for (value, _), (right, _) in zip(served_answer, plain_answer, strict=True):
            assert value == pytest.approx(right, abs=0.05 * abs(right) + 0.1)  # bfloat16 against float32
    assert "HALFBYTE_VLLM_PYTHON" in os.environ
