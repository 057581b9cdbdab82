"""What blocks compute in, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from conftest import Models
from halfbyte import arithmetic, statistics
from halfbyte.arithmetic import bfloat16_products, compute_dtype
from halfbyte.errors import ResumeError, UsageError
from halfbyte.pipeline import quantize
from halfbyte.statistics import SecondMoment

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("wanted", "stored", "device", "bits", "fast", "expected"),
    [
        ("auto", BF16, "cpu", 4, True, BF16),
        ("auto", BF16, "cpu", 4, False, F32),
        ("auto", BF16, "cpu", 8, True, F32),
        ("auto", F16, "cpu", 4, True, F32),
        ("auto", F32, "cpu", 4, True, F32),
        ("auto", F16, "cuda", 4, False, F16),
        ("float32", BF16, "cpu", 4, True, F32),
        ("float32", BF16, "cuda", 4, True, F32),
        ("bfloat16", F32, "cpu", 8, False, BF16),
    ],
)
def test_what_blocks_compute_in(
    wanted: Any,
    stored: torch.dtype,
    device: str,
    bits: int,
    fast: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "fast_bfloat16", lambda: fast)
    assert compute_dtype(wanted, stored, device, bits) == expected


@pytest.mark.parametrize("fast", [True, False])
def test_second_moments_of_bfloat16(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are not rounded again: the sums are those of float32 tokens of the same values, but for what one rounding
    of each of a few batches leaves, which is little beside what chance has in as many tokens."""
    monkeypatch.setattr(statistics, "fast_bfloat16", lambda: fast)
    x = (torch.randn(3000, 640, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 30, 640)).to(BF16)
    moment = SecondMoment.empty(640, torch.device("cpu"))
    for part in torch.split(x, 1024):
        moment.add(part)
    exact = x.double().T @ x.double()
    size = exact.diagonal().sqrt()
    errors = (moment.finish() - exact) / (size[:, None] * size)
    assert float(errors.abs().max()) < (2**-8 if fast else 5e-6)
    chance = exact / (size[:, None] * size) - torch.eye(640)  # columns are independent
    assert float(torch.linalg.matrix_norm(errors, 2)) < 0.01 * float(torch.linalg.matrix_norm(chance, 2))
    assert moment.tokens == 3000


def test_other_products_stay_float32() -> None:
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(2))
    before = a @ a
    with pytest.raises(ZeroDivisionError), bfloat16_products():
        raise ZeroDivisionError
    assert torch.equal(a @ a, before)


@pytest.mark.parametrize("effort", ["standard", "high"])
def test_both_dtypes_quantize_alike(effort: Any, tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source = tiny_model("gemma3")
    options: dict[str, Any] = {"group_size": 32, "calibration": f"text:{text_file}", "samples": 6, "seq_len": 40}
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        manifest = quantize(source, out, **options, effort=effort, device="cpu", dtype=dtype)  # type: ignore[arg-type]
        assert manifest.run["dtype"] == dtype
        assert halfbyte.verify(out, source=source).passed
        found[dtype] = halfbyte.compare(source, out, text=text_file, tokens=400, window=100, device="cpu").metrics
    assert found["bfloat16"]["kl_mean"] == pytest.approx(found["float32"]["kl_mean"], rel=0.25)
    assert found["bfloat16"] != found["float32"]


def test_a_run_resumes_in_its_own_dtype_only(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"group_size": 32, "calibration": f"text:{text_file}", "samples": 4, "seq_len": 40}
    monkeypatch.setattr("halfbyte.pipeline.Job._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model("llama"), tmp_path / "out", **options, device="cpu", dtype="bfloat16")
    with pytest.raises(ResumeError, match="dtype"):
        quantize(tiny_model("llama"), tmp_path / "out", **options, device="cpu", dtype="float32", resume=True)


def test_an_unknown_dtype_is_refused(tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float16"):
        quantize(tiny_model("llama"), tmp_path / "out", dtype="float16")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
