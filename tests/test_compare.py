"""``compare`` against the same measures computed directly: whole models, float64, numpy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halfbyte
import tiny
from conftest import Models
from halfbyte.errors import CalibrationError, CheckpointError, UsageError
from halfbyte.evaluation.divergence import compare_rows, mean_and_se
from halfbyte.evaluation.windows import cut
from halfbyte.records import CompareRecord, read_record

WINDOW = 48


@pytest.fixture(scope="module")
def quantized(
    tiny_model: Models, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    def make(family: str, scheme: str, **options: Any) -> tuple[Path, Path]:
        wide = tiny.WIDE if scheme == "FP8_BLOCK" else {}
        source, out = tiny_model(family, **wide), tmp_path_factory.mktemp("compared") / "out"
        settings = {"calibration": f"text:{text_file}", "samples": 4, "seq_len": 40, "device": "cpu"}
        halfbyte.quantize(source, out, scheme=scheme, **(settings | options))
        return source, out

    return make


def quantize_inputs(model: Any, kind: str, width: int | None = None) -> None:
    """Make every Linear of the blocks see its input as an engine makes it: one scale a token or ``width`` of it."""

    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        parts = x.split(width or x.shape[-1], dim=-1)
        extreme = torch.cat([p.abs().amax(-1, keepdim=True).expand_as(p) for p in parts], dim=-1)
        if kind == "int":
            return (torch.clamp(torch.round(x / (extreme / 127)), -128, 127) * (extreme / 127),)
        return ((x / (extreme / 448)).float().to(torch.float8_e4m3fn).to(x.dtype) * (extreme / 448),)

    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook)


def log_probabilities(model: Any, windows: list[list[int]]) -> list[np.ndarray]:
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([w])).logits[0].double(), -1).numpy() for w in windows]


def expected_metrics(base: Any, other: Any, folder: Path) -> tuple[dict[str, float], int]:
    """The divergence set over windows of BOS and 47 tokens, reckoned the long way in the models' dtype and float64."""
    ids = tiny.token_ids(folder, 10**6)[0, 1:].tolist()
    targets = [ids[i : i + WINDOW - 1] for i in range(0, len(ids), WINDOW - 1)]
    windows = [[1, *t] for t in targets]
    kl: list[list[float]] = []
    nll_p, nll_q, agrees, change = ([[] for _ in windows] for _ in range(4))
    for w, (p, q) in enumerate(zip(log_probabilities(base, windows), log_probabilities(other, windows), strict=True)):
        kl.append([])
        for i, t in enumerate(targets[w]):
            kl[w].append(float((np.exp(p[i]) * (p[i] - q[i])).sum()))
            nll_p[w].append(-p[i, t])
            nll_q[w].append(-q[i, t])
            agrees[w].append(float(p[i].argmax() == q[i].argmax()))
            change[w].append(math.exp(q[i, t]) - math.exp(p[i, t]))
    n = len(ids)

    def mean(values: list[list[float]]) -> float:
        return sum(map(sum, values)) / n

    def error(values: list[list[float]]) -> float:
        m, count = mean(values), len(values)
        return math.sqrt(sum(sum(x - m for x in v) ** 2 for v in values) * count / (count - 1)) / n

    delta = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(nll_p, nll_q, strict=True)]
    flat = np.concatenate([np.array(v) for v in kl])
    ratio = math.exp(mean(delta))
    return {
        "perplexity_base": math.exp(mean(nll_p)),
        "perplexity": math.exp(mean(nll_q)),
        "perplexity_ratio": ratio,
        "perplexity_ratio_se": ratio * error(delta),
        "kl_mean": mean(kl),
        "kl_se": error(kl),
        "kl_median": float(np.quantile(flat, 0.5)),
        "kl_p99": float(np.quantile(flat, 0.99)),
        "kl_p999": float(np.quantile(flat, 0.999)),
        "kl_max": float(flat.max()),
        "top1_agreement": mean(agrees),
        "top1_agreement_se": error(agrees),
        "rms_probability_change": math.sqrt(mean([[x * x for x in v] for v in change])),
    }, n


def check(record: CompareRecord, expected: dict[str, float], tokens: int, tolerance: float) -> None:
    assert record.tokens == tokens
    assert record.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert record.metrics[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    check_windows(record)


def check_windows(record: CompareRecord) -> None:
    """The sums are those that the metrics and, since these depend on what is where, their standard errors come from."""
    full, rest = divmod(record.tokens, WINDOW - 1)
    assert [w.tokens for w in record.by_window] == [WINDOW - 1] * full + [rest] * (rest > 0)
    count, m = len(record.by_window), record.metrics
    columns = {
        (m["kl_mean"], m["kl_se"]): [w.kl for w in record.by_window],
        (math.log(m["perplexity"]), None): [w.nll for w in record.by_window],
        (math.log(m["perplexity_ratio"]), m["perplexity_ratio_se"] / m["perplexity_ratio"]): [
            w.nll - w.nll_base for w in record.by_window
        ],
        (m["top1_agreement"], m["top1_agreement_se"]): [w.agreements for w in record.by_window],
    }
    for (mean, se), sums in columns.items():
        assert sum(sums) / record.tokens == pytest.approx(mean)
        squares = sum((x - w.tokens * mean) ** 2 for x, w in zip(sums, record.by_window, strict=True))
        assert se is None or math.sqrt(squares * count / (count - 1)) / record.tokens == pytest.approx(se)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "W8A8"),
        ("gemma3", "W8A8"),
        ("llama", "FP8_DYNAMIC"),
        ("qwen2", "W4A16"),
        ("gemma3", "W4A16"),
        ("llama", "W4A8"),
        ("qwen3", "FP8_BLOCK"),
        ("qwen2", "W2A16"),
    ],
)
def test_metrics_are_those_of_a_direct_computation(
    family: str, scheme: str, quantized: Callable[..., tuple[Path, Path]], text_file: Path
) -> None:
    source, out = quantized(family, scheme, group_size=32 if scheme.startswith(("W4", "W2")) else None)
    record = halfbyte.compare(source, out, text=text_file, window=WINDOW, device="cpu")
    other = tiny.load(source)
    other.load_state_dict(tiny.decoded(out), strict=False)
    base = tiny.load(source)
    if scheme.endswith("A16"):
        base, other = base.double(), other.double()
    else:  # in float32 as compare does it: in float64, activations next to a tie would go the other way
        quantize_inputs(other, "int" if scheme.endswith("A8") else "float", 128 if scheme == "FP8_BLOCK" else None)
    expected, tokens = expected_metrics(base, other, source)
    assert expected["kl_mean"] > 1e-5
    check(record, expected, tokens, 1e-3 if scheme.endswith("A16") else 5e-3)
    assert read_record(CompareRecord, out / "compare.json") == record


def test_activation_quantisation_is_part_of_the_comparison(
    quantized: Callable[..., tuple[Path, Path]], text_file: Path
) -> None:
    """The same weights without it are closer to the baseline: a comparison that forgot it would flatter."""
    source, out = quantized("llama", "W8A8")
    record = halfbyte.compare(source, out, text=text_file, window=WINDOW, device="cpu")
    other = tiny.load(source)
    other.load_state_dict(tiny.decoded(out), strict=False)
    forgotten, _ = expected_metrics(tiny.load(source), other, source)
    assert record.metrics["kl_mean"] > 1.3 * forgotten["kl_mean"]


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_model_does_not_differ_from_itself(family: str, tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model(family), copy)
    metrics = halfbyte.compare(tiny_model(family), copy, text=text_file, window=WINDOW, device="cpu").metrics
    zeros = [n for n in metrics if n.startswith("kl_") or n.endswith("_se") or n == "rms_probability_change"]
    assert [n for n in zeros if metrics[n] != 0] == []
    assert (metrics["perplexity_ratio"], metrics["top1_agreement"]) == (1, 1)
    assert metrics["perplexity"] == metrics["perplexity_base"] > 1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_models_with_heads_of_their_own(family: str, tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    """Two unrelated models: nothing after the last block is shared, tied or not."""
    shutil.copytree(tiny_model(family, seed=12), tmp_path / "other")
    base, other = tiny_model(family), tmp_path / "other"
    record = halfbyte.compare(base, other, text=text_file, window=WINDOW, device="cpu")
    expected, tokens = expected_metrics(tiny.load(base), tiny.load(other), base)
    assert expected["kl_mean"] > 0.1
    check(record, expected, tokens, 1e-3)


def test_only_the_head_differs(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, other = tiny_model("llama"), tmp_path / "other"
    shutil.copytree(base, other)
    tensors = tiny.stored(base)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, dims=0)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    record = halfbyte.compare(base, other, text=text_file, window=WINDOW, device="cpu")
    expected, tokens = expected_metrics(tiny.load(base), tiny.load(other), base)
    check(record, expected, tokens, 1e-3)


def test_tokens_and_text_are_as_asked(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model("llama"), copy)
    record = halfbyte.compare(tiny_model("llama"), copy, text=text_file, tokens=100, window=WINDOW, device="cpu")
    assert (record.tokens, record.text, record.window) == (100, "ferry.txt", WINDOW)
    own = halfbyte.compare(copy, copy, tokens=50, device="cpu")
    assert (own.tokens, own.text) == (50, "halfbyte's own short text")


def test_what_cannot_be_compared(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source, wider = tiny_model("llama"), tiny_model("llama", vocab_size=tiny.VOCAB + 8)
    with pytest.raises(CheckpointError, match="vocabularies differ: 320 and 328 tokens"):
        halfbyte.compare(source, wider, text=text_file, device="cpu")
    with pytest.raises(UsageError, match="a window of 1 predicts nothing"):
        halfbyte.compare(source, source, text=text_file, window=1, device="cpu")
    (tmp_path / "short.txt").write_text("ferry")
    with pytest.raises(CalibrationError, match="at least 16 are needed"):
        halfbyte.compare(source, source, text=tmp_path / "short.txt", device="cpu")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8 text"):
        halfbyte.compare(source, source, text=tmp_path / "latin.txt", device="cpu")


# Windows


@given(count=st.integers(1, 300), length=st.integers(2, 40), bos=st.sampled_from([None, 999]))
def test_every_token_is_scored_once_after_what_stands_before_it(count: int, length: int, bos: int | None) -> None:
    windows = cut(torch.arange(count), bos, length)
    scored = [t for w in windows for t in w.targets.tolist()]
    assert scored == list(range(0 if bos is not None else 1, count))
    for w in windows:
        assert 1 <= len(w.targets) <= len(w.inputs) <= length
        for position, target in enumerate(w.targets.tolist()):
            before = w.inputs[: position + 1].tolist()
            assert before[-1] == (target - 1 if bos is None or position else bos)
            assert target not in before
        if bos is not None:
            assert w.inputs[0] == bos


# Numbers


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=8),
    seed=st.integers(0, 1000),
)
def test_standard_errors_count_windows(sizes: list[int], seed: int) -> None:
    clusters = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.randn(len(clusters), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, se = mean_and_se(x, clusters)
    m = sum(x.tolist()) / len(x)
    sums = [sum(v - m for v, c in zip(x.tolist(), clusters.tolist(), strict=True) if c == w) for w in range(len(sizes))]
    w = len(sizes)
    assert mean == pytest.approx(m)
    assert se == pytest.approx(math.sqrt(sum(s * s for s in sums) * w / (w - 1)) / len(x))


def test_with_equal_windows_it_is_the_error_of_their_means() -> None:
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, se = mean_and_se(x.flatten(), torch.arange(20).repeat_interleave(7))
    assert se == pytest.approx(float(x.mean(1).std(correction=1)) / math.sqrt(20))
    _, alone = mean_and_se(x[0], torch.zeros(7, dtype=torch.int64))
    assert alone == pytest.approx(float(x[0].std(correction=1)) / math.sqrt(7))


def test_large_logits_do_not_overflow() -> None:
    """float32 logits of a few hundred: exponentials of them would be infinite."""
    generator = torch.Generator().manual_seed(2)
    p, q = (300 * torch.randn(9, 50, generator=generator) for _ in range(2))
    targets = torch.arange(9)
    nll_p, nll_q, kl, agrees, change = (x.numpy() for x in compare_rows(p, q, targets))
    a, b = (torch.log_softmax(x.double(), -1).numpy() for x in (p, q))
    rows = np.arange(9)
    np.testing.assert_allclose(nll_p, -a[rows, rows], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(nll_q, -b[rows, rows], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(kl, (np.exp(a) * (a - b)).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(agrees, a.argmax(-1) == b.argmax(-1))
    np.testing.assert_allclose(change, np.exp(b[rows, rows]) - np.exp(a[rows, rows]), atol=1e-5)
