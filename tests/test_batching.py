"""Linears of one shape in one batch: each becomes what it becomes alone, to the bit, in the memory that is foretold."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import NumericsError
from halfbyte.methods.batching import factoring_bytes, largest_batch, peak_bytes, solving_bytes, worthwhile
from halfbyte.methods.gptq import factor_hessian, factor_hessians, quantize_gptq, quantize_gptq_batch
from halfbyte.methods.result import QuantizedWeight
from halfbyte.recipe import GptqSteps
from halfbyte.schemes import WeightFormat

BATCH = 4
PLAIN, DEAD, FEW_TOKENS, INDEFINITE, NO_TOKENS = range(5)


def hessian(kind: int, n: int, seed: int) -> torch.Tensor:
    """Of correlated inputs; or one that is hard to factor in its own way."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n + 3, n, generator=generator) * torch.rand(n, generator=generator).add(0.1)
    if kind == DEAD:
        x[:, torch.randperm(n, generator=generator)[: n // 8 + 1]] = 0.0
    if kind == FEW_TOKENS:
        x = x[: n // 4]
    if kind == NO_TOKENS:
        x = x[:0]
    h = x.T @ x
    if kind == INDEFINITE:
        h[0], h[:, 0] = 0.0, 0.0
        h[0, 0] = -0.03 * float(h.diagonal().mean())
    return h


def equal(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    zeros = left.zero_points is right.zero_points is None or (
        left.zero_points is not None
        and right.zero_points is not None
        and torch.equal(left.zero_points, right.zero_points)
    )
    same = zeros and torch.equal(left.codes, right.codes) and torch.equal(left.scales, right.scales)
    return same and left.relative_error == pytest.approx(right.relative_error, rel=1e-12)


problems = st.fixed_dictionaries(
    {
        "kinds": st.lists(st.integers(PLAIN, NO_TOKENS), min_size=BATCH, max_size=BATCH),
        "rows": st.integers(1, 70),
        "groups": st.integers(1, 5),
        "size": st.sampled_from([16, 32, 96]),
        "channel": st.booleans(),
        "symmetric": st.booleans(),
        "bits": st.sampled_from([3, 4, 8]),
        "damp_fraction": st.sampled_from([0.0, 0.01]),
        "steps": st.builds(
            GptqSteps,
            static_order=st.booleans(),
            scale_search=st.booleans(),
            scale_refit=st.booleans(),
            code_descent=st.booleans(),
            sweeps=st.integers(1, 2),
        ),
        "shrinkage": st.lists(st.sampled_from([0.0, 0.3, 20.0]), min_size=BATCH, max_size=BATCH),
        "seed": st.integers(0, 1000),
    }
)


@given(p=problems)
@settings(max_examples=60)
def test_what_a_linear_becomes_does_not_depend_on_its_batch(p: dict[str, Any]) -> None:
    n, rows = p["groups"] * p["size"], p["rows"]
    fmt = WeightFormat(num_bits=p["bits"], symmetric=p["symmetric"], group_size=None if p["channel"] else p["size"])
    hessians = torch.stack([hessian(kind, n, p["seed"] + i) for i, kind in enumerate(p["kinds"])])
    weights = torch.randn(BATCH, rows, n, generator=torch.Generator().manual_seed(p["seed"]))
    kept = hessians.clone(), weights.clone()
    where, ordered = [f"experts.{i}" for i in range(BATCH)], p["steps"].static_order
    factors = factor_hessians(hessians, p["damp_fraction"], where=where, static_order=ordered, shrinkage=p["shrinkage"])
    found = quantize_gptq_batch(weights, hessians, factors, fmt, torch.bfloat16, p["steps"])
    assert torch.equal(hessians, kept[0])
    assert torch.equal(weights, kept[1])
    assert [len(of_one) for of_one in found] == [1] * BATCH
    for i in range(BATCH):
        alone = factor_hessian(
            hessians[i], p["damp_fraction"], where=where[i], static_order=ordered, shrinkage=p["shrinkage"][i]
        )
        assert torch.equal(alone.upper[0], factors.upper[i])
        assert torch.equal(alone.damping[0], factors.damping[i])
        assert (alone.raises[0], alone.damp_fractions[0]) == (factors.raises[i], factors.damp_fractions[i])
        expected = quantize_gptq(weights[i], hessians[i], alone, fmt, torch.bfloat16, p["steps"])
        assert equal(found[i][0], expected)


@pytest.mark.parametrize("width", [256, 640])
def test_each_hessian_gets_the_damping_that_it_needs(width: int) -> None:
    kinds = [PLAIN, INDEFINITE, FEW_TOKENS, NO_TOKENS, DEAD]
    hessians = torch.stack([hessian(kind, width, i) for i, kind in enumerate(kinds)])
    where = [str(i) for i in range(5)]
    factors = factor_hessians(hessians, 0.01, where=where)
    assert factors.raises == (0, 1, 0, 0, 0)
    assert factors.damp_fractions == pytest.approx((0.01, 0.1, 0.01, 0.01, 0.01))
    undamped = factor_hessians(hessians, 0.0, where=where)
    assert undamped.raises[0] == undamped.raises[4] == undamped.raises[3] == 0
    assert undamped.raises[1] > 1
    assert undamped.raises[2] == 1
    assert factors.dead.sum(dim=1).tolist() == [0, 0, 0, width, width // 8 + 1]
    for i, kind in enumerate(kinds):
        h = hessian(kind, width, i).double()[factors.order[i]][:, factors.order[i]]
        added = torch.where(factors.dead[i], float(h.diagonal().mean()) or 1.0, factors.damping[i])
        upper = factors.upper[i].double()
        unit = upper.T @ upper @ (h + added[factors.order[i]].double().diag())
        torch.testing.assert_close(unit, torch.eye(width).double(), rtol=0, atol=1e-2)


def test_who_is_hopeless_is_named() -> None:
    hessians = torch.eye(4).repeat(5, 1, 1)
    hessians[[1, 3, 4], 2, 2] = -500.0
    hessians[[1, 3, 4], 3, 3] = 499.0
    where = [f"experts.{i}.up" for i in range(5)]
    with pytest.raises(
        NumericsError, match=r"^experts\.1\.up and 2 more: the Hessian cannot be factored even with 100"
    ):
        factor_hessians(hessians, 0.01, where=where)
    hessians = torch.eye(4).repeat(5, 1, 1)
    hessians[2, 1, 0] = hessians[2, 0, 1] = torch.nan
    with pytest.raises(NumericsError, match=r"^experts\.2\.up: the Hessian holds NaN or infinity"):
        factor_hessians(hessians, 0.01, where=where)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_linears_that_share_a_hessian_are_solved_along_rows(symmetric: bool, group_size: int | None) -> None:
    """Gate and up of each expert; and all experts of a layer, with one Hessian for all."""
    fmt = WeightFormat(num_bits=4, symmetric=symmetric, group_size=group_size)
    rows, n = [40, 24], 160
    weights = torch.randn(BATCH, sum(rows), n, generator=torch.Generator().manual_seed(5))
    hessians = torch.stack([hessian(kind, n, kind) for kind in (PLAIN, DEAD, FEW_TOKENS, PLAIN)])
    factors = factor_hessians(hessians, 0.01, where=["w"] * BATCH)
    found = quantize_gptq_batch(weights, hessians, factors, fmt, torch.bfloat16, rows=rows)
    for i in range(BATCH):
        alone = factor_hessian(hessians[i], 0.01, where="w")
        for part, weight in zip(found[i], torch.split(weights[i], rows), strict=True):
            assert equal(part, quantize_gptq(weight, hessians[i], alone, fmt, torch.bfloat16))

    one = factor_hessian(hessians[1], 0.01, where="w")
    stacked = weights.reshape(1, -1, n)
    (shared,) = quantize_gptq_batch(stacked, hessians[1:2], one, fmt, torch.bfloat16, rows=[sum(rows)] * BATCH)
    for part, weight in zip(shared, weights, strict=True):
        assert equal(part, quantize_gptq(weight, hessians[1], one, fmt, torch.bfloat16))


def test_a_batch_that_overflows_in_one_place_goes_on_in_the_others() -> None:
    """What such a Linear's error is cannot be said; its codes are those of the columns alone."""
    fmt = WeightFormat(num_bits=4, group_size=32)
    weights = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    hessians = torch.stack([hessian(PLAIN, 64, i) for i in range(3)])
    hessians[1] *= 1e32
    weights[1] *= 1e6
    factors = factor_hessians(hessians, 0.01, where=["w"] * 3)
    found = quantize_gptq_batch(weights, hessians, factors, fmt, torch.float32)
    for i in (0, 2):
        alone = factor_hessian(hessians[i], 0.01, where="w")
        assert equal(found[i][0], quantize_gptq(weights[i], hessians[i], alone, fmt, torch.float32))


MEASURED = """
import sys
import torch
from halfbyte import heap
from halfbyte.methods.gptq import factor_hessians, quantize_gptq_batch
from halfbyte.schemes import WeightFormat

def status(what):
    return 1024 * int(open("/proc/self/status").read().split(what + ":")[1].split()[0])

def solve(batch, rows, n, damping, group):
    # Dead inputs, so that the weight without them is made.
    weights = torch.randn(batch, rows, n)
    hessians = torch.eye(n).repeat(batch, 1, 1)
    hessians[:, 3, 3] = 0.0
    open("/proc/self/clear_refs", "w").write("5")
    peaks = []
    factors = factor_hessians(hessians, damping, where=["w"] * batch)
    peaks.append(status("VmHWM"))
    open("/proc/self/clear_refs", "w").write("5")
    quantize_gptq_batch(weights, hessians, factors, WeightFormat(num_bits=4, group_size=group), torch.bfloat16)
    peaks.append(status("VmHWM"))
    return peaks

torch.set_num_threads(1)
# Small tensors too, which in use come from the heap: how much of it is holes differs by 10 MiB from run to run, even of
# the same arithmetic on one thread.
heap.LEAST_MAPPED = 16 << 10
with heap.mapped():
    damping, group = float(sys.argv[4]), int(sys.argv[5]) or None
    solve(2, 32, 512, damping, group)  # loads what of the libraries this damping's arithmetic needs
    heap.release_freed_memory()
    before = status("VmRSS")
    print(*(peak - before for peak in solve(*map(int, sys.argv[1:4]), damping, group)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(
    ("batch", "rows", "width", "damping", "group"),
    [
        (6, 256, 1024, 0.01, 128),
        (6, 256, 1024, 0.0, 128),
        (8, 1024, 384, 0.01, 128),
        (1, 4096, 1024, 0.01, 128),
        (6, 256, 1024, 0.01, None),
        (1, 4096, 1024, 0.01, None),
    ],
)
def test_peaks_are_those_foretold(batch: int, rows: int, width: int, damping: float, group: int | None) -> None:
    numbers = map(str, (batch, rows, width, damping, group or 0))
    done = subprocess.run([sys.executable, "-c", MEASURED, *numbers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    factoring, solving = map(int, done.stdout.split())
    weights = 4 * batch * rows * width
    expected = solving_bytes(batch, rows, width, WeightFormat(num_bits=4, group_size=group))
    room = 8 << 20  # the kernels' own
    assert 0.85 * factoring_bytes(batch, width, damping) < factoring - weights
    assert factoring - weights < factoring_bytes(batch, width, damping) + room
    assert 0.85 * expected < solving < expected + room


def test_as_many_as_fit() -> None:
    fmt = WeightFormat(num_bits=4, group_size=128)
    shape = (768, 2048, fmt, 0.01)
    for room in (1 << 20, 1 << 28, 1 << 30, 1 << 33):
        batch = largest_batch(128, *shape, room)
        assert 1 <= batch <= 128
        assert batch == 1 or peak_bytes(batch, *shape) <= room
        assert batch == 128 or peak_bytes(batch + 1, *shape) > room
    assert largest_batch(128, *shape, 1 << 40) == 128


def test_a_few_threads_need_no_batch() -> None:
    cpu = torch.device("cpu")
    assert [worthwhile(cpu, threads) for threads in (1, 2, 7, 8, 64)] == [1, 1, 1, 2, 16]
    assert worthwhile(torch.device("cuda"), 1) > 128
