"""benchmarks/gpu.py: its whole code path on toy shapes on the CPU, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from gpu_work import LLAMA_3_8B, TINY, made, relative_error

CPU = torch.device("cpu")
SCRIPT = Path(gpu.__file__)


def test_it_runs_in_one_command(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--result", out, "--scratch", tmp_path]
    done = subprocess.run([*command, "--blocks", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["commit"]["commit"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["card"]["name"] == "cpu"
    found = result["blocks"]
    assert found["block_s"] == found["all_blocks_s"][1]
    assert all(found["stages_s"][stage] > 0 for _, _, stage in gpu.STAGES)
    assert found["stages_s"]["rest"] > -0.1 * sum(found["awaited_blocks_s"])
    assert found["standard_block_s"] > 0
    tokens, rate = 64 * 64, result["card"]["bfloat16_measured"]
    forward = 2 * tokens * (TINY.weights + 65 * TINY.hidden)
    assert result["shares"]["forward_operations"] == forward
    all_blocks = 3 * forward - 2 * tokens * TINY.hidden * TINY.inner
    assert result["shares"]["forward"] == pytest.approx(all_blocks / found["stages_s"]["forward"] / rate)
    moments = tokens * sum(width * (width + 1) for width, _ in TINY.inputs())
    share = 3 * moments / found["stages_s"]["second moments"] / rate
    assert result["shares"]["second moments"] == pytest.approx(share)
    assert result["shares"]["block"] == pytest.approx((forward + moments) / found["block_s"] / rate)
    assert all(0 < result["shares"][stage] < 10 for stage in ("block", "forward", "second moments"))
    ours = result["same_matrices"]["halfbyte"]
    assert set(ours["relative_errors"]) == {n for _, linears in TINY.inputs() for n in linears}
    assert all(0 < e < 0.05 for e in ours["relative_errors"].values())
    peer = result["same_matrices"]["llm-compressor"]
    assert "hessians_s" in peer or "llm-compressor is not installed" in peer["skipped"]
    assert done.stdout.strip() == gpu.render(result).strip()
    result["shares"]["block"], result["card"]["bfloat16_nominal"] = 0.3, 2 * rate
    assert "30.0 % of the measured rate and 15.0 % of its maker's (--effort low)" in gpu.render(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "torch sees no GPU. On a CPU this runs with --device cpu --tiny, to try its code.\n"


def test_the_shapes_are_llama_3_8b() -> None:
    assert LLAMA_3_8B.weights == 218103808
    assert [width for width, _ in LLAMA_3_8B.inputs()] == [4096, 4096, 4096, 14336]


def test_both_tools_get_the_same_matrices() -> None:
    first, second = (list(made(TINY, 100, CPU)) for _ in range(2))
    for (weights, batches), (others, again) in zip(first, second, strict=True):
        assert all(torch.equal(weights[n], others[n]) for n in weights)
        assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
        assert sum(len(b) for b in batches) == 100


def test_the_relative_error_is_that_of_outputs() -> None:
    x, w = torch.randn(50, 8), torch.randn(4, 8)
    q = w + 0.1 * torch.randn(4, 8)
    expected = float(((x @ (q - w).T).square().sum()) / (x @ w.T).square().sum())
    assert relative_error(w, q, x.T @ x) == pytest.approx(expected, rel=1e-4)


def test_nested_stages_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    clock = gpu.Clock(CPU)
    inner = clock.timed(lambda: wait(0.5), "second moments")

    def outer() -> None:
        wait(0.25)
        inner()
        inner()

    clock.timed(outer, "forward")()
    assert clock.spent["second moments"] == 1.0
    assert clock.spent["forward"] == 0.25
