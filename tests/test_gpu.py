"""What only a GPU can show. Skipped without one; `tests/test_triton.py` runs the kernels themselves anywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import tiny
from conftest import Models
from halfbyte import quantize, verify
from halfbyte.gpu import to_host, wait_for_copies
from halfbyte.kernels.dispatch import gpu_problem
from halfbyte.methods.gptq import factor_hessian, quantize_gptq
from halfbyte.read_ahead import ReadAhead
from halfbyte.records import Manifest
from halfbyte.schemes import WeightFormat
from halfbyte.statistics import SecondMoment, multiplies_mixed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
GPU = torch.device("cuda")


def test_the_kernels_pass_their_trial() -> None:
    assert gpu_problem(GPU) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_second_moments_are_as_exact_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(700, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)
    moment = SecondMoment.empty(1100, GPU)
    for part in (x[:300], x[300:]):
        moment.add(part.to(GPU))
    exact = x.double().T @ x.double()
    found = moment.take().cpu().double()
    assert torch.equal(found, found.T)
    assert float((found - exact).abs().max() / exact.diagonal().mean()) < 2e-6
    assert multiplies_mixed(x.to(GPU)) or dtype == torch.float32 or torch.cuda.get_device_capability() < (8, 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 128])
def test_the_solver_agrees_with_the_cpu(symmetric: bool, group_size: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, n = 300, 1280
    x = torch.randn(4 * n, n, generator=generator) @ (torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n))
    weight, hessian = torch.randn(rows, n, generator=generator), x.T @ x
    fmt = WeightFormat(num_bits=4, symmetric=symmetric, group_size=group_size)
    results = []
    for device in (torch.device("cpu"), GPU):
        h = hessian.to(device)
        factor = factor_hessian(h, 0.01, where="w")
        results.append(quantize_gptq(weight.to(device), h, factor, fmt, torch.bfloat16).map(torch.Tensor.cpu))
    cpu, gpu = results
    assert float((cpu.codes != gpu.codes).float().mean()) < 0.05
    assert gpu.relative_error == pytest.approx(cpu.relative_error, rel=0.01)


def test_copies_arrive() -> None:
    x = torch.arange(1 << 22, device=GPU)
    host = to_host(x * 2)
    wait_for_copies(GPU)
    assert host.is_pinned()
    assert torch.equal(host, torch.arange(1 << 22) * 2)


def test_what_is_read_ahead_arrives() -> None:
    stored = {str(i): torch.full((1 << 20,), float(i)) for i in range(8)}
    ahead = ReadAhead.onto(stored.__getitem__, GPU, torch.bfloat16)
    for _ in range(5):  # so that memory is handed out again
        ahead.ask(stored)
        for name, value in stored.items():
            found = ahead.take(name)
            assert found is not None
            assert found.is_cuda
            assert torch.equal((found * 2).cpu(), value.bfloat16() * 2)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8"])
def test_a_model_quantised_on_the_gpu(scheme: str, tiny_model: Models, tmp_path: Path) -> None:
    """Activations are bfloat16 there, so codes of flat minima differ; the error of each Linear hardly does."""
    source = tiny_model("llama", num_hidden_layers=3)
    made: dict[str, Manifest] = {}
    for name, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")):
        made[name] = quantize(
            source,
            tmp_path / name,
            scheme=scheme,
            group_size=None if scheme == "W8A8" else 32,
            calibration="random-tokens",
            samples=64,
            seq_len=64,
            device=device,
        )
    assert verify(tmp_path / "gpu", source=source).passed
    cpu, gpu = tiny.decoded(tmp_path / "cpu"), tiny.decoded(tmp_path / "gpu")
    assert cpu.keys() == gpu.keys()
    for left, right in zip(made["cpu"].linears, made["gpu"].linears, strict=True):
        assert right.relative_error == pytest.approx(left.relative_error, rel=0.1)
        assert right.tokens == left.tokens
        weight = f"{left.name}.weight"
        difference = (cpu[weight] - gpu[weight]).abs() > 1e-3 * cpu[weight].abs().mean()
        if left.block == 0 and left.name.endswith("q_proj"):
            assert float(difference.float().mean()) < 0.1
    digests = {n: hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).hexdigest() for n in made}
    assert digests["gpu"] == digests["again"]


def test_without_triton_the_cpu_solves(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.pipeline.gpu_problem", lambda _: "Triton is not installed")
    source = tiny_model("llama")
    quantize(source, tmp_path / "out", group_size=32, calibration="random-tokens", samples=8, seq_len=32, device="cuda")
    assert verify(tmp_path / "out", source=source).passed


def test_a_model_tuned_as_a_whole_on_the_gpu(tiny_model: Models, tmp_path: Path) -> None:
    """Blocks, then all scales together."""
    source, out = tiny_model("llama", num_hidden_layers=3), tmp_path / "out"
    size = {"group_size": 32, "samples": 64, "seq_len": 64}
    made = quantize(source, out, scheme="W4A16", calibration="random-tokens", effort="high", device="cuda", **size)
    assert verify(out, source=source).passed
    assert len(made.tuning) == 3
    assert made.end_to_end is not None
    assert made.end_to_end.kept == (made.end_to_end.kl_after < made.end_to_end.kl_before)
