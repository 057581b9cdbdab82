"""Second moments against X^T X in float64, and who shares one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from halfbyte import statistics
from halfbyte.statistics import Collector, SecondMoment

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: torch.Tensor) -> torch.Tensor:
    flat = x.double().reshape(-1, x.shape[-1])
    return flat.T @ flat


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 31, 33])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_moment_around_the_strips(
    width: int, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bfloat16 is multiplied fast, each batch's sum is rounded to it; nothing else is rounded."""
    monkeypatch.setattr(statistics, "STRIP", 8)
    monkeypatch.setattr(statistics, "fast_bfloat16", lambda: fast)
    moment = SecondMoment.empty(width, CPU)
    batches = [normal(tokens, width, seed=tokens).to(dtype) for tokens in (5, 1, 20)]
    for x in batches:
        moment.add(x)
    h = moment.finish()
    rounded = fast and dtype == torch.bfloat16
    room = sum(exact(x).abs() for x in batches) * (2**-8 if rounded else 0.0) + 1e-5
    errors = (h.double() - exact(torch.cat(batches))).abs()
    assert h.dtype == torch.float32
    assert bool((errors <= room).all())
    assert torch.allclose(h, h.T, rtol=1e-6, atol=1e-6)
    assert moment.tokens == 26


def test_widths_past_a_real_strip() -> None:
    moment = SecondMoment.empty(statistics.STRIP + 3, CPU)
    x = normal(40, statistics.STRIP + 3)
    moment.add(x)
    assert torch.allclose(moment.finish().double(), exact(x), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """q, k and v see one tensor; out sees another; twin sees a copy of q's; down comes last."""

    def __init__(self) -> None:
        super().__init__()
        for name, (inside, outside) in {
            "q": (6, 6), "k": (6, 6), "v": (6, 6), "twin": (6, 6), "out": (6, 10), "down": (10, 6)
        }.items():  # fmt: skip
            setattr(self, name, nn.Linear(inside, outside, bias=False))
        self.finished = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2.0
        mixed = self.q(h) + self.k(h) * self.v(h) + self.twin(h.clone())
        y: torch.Tensor = self.down(torch.tanh(self.out(mixed)))
        self.finished += 1
        return y


def collect(
    block: nn.Module,
    batches: list[torch.Tensor],
    rows: list[torch.Tensor | None] | None = None,
    names: list[str] | None = None,
) -> Collector:
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and (names is None or n in names)}
    with Collector(linears, CPU) as collector, torch.no_grad():
        for x, mask in zip(batches, rows or [None] * len(batches), strict=True):
            collector.run(lambda x=x: block(x), mask)
    return collector


def of(collector: Collector, name: str) -> SecondMoment:
    return next(m for m in collector.moments if name in m.names)


def watched(block: nn.Module, batches: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What each Linear receives, recorded by a hook of the test's own."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, arguments: seen.setdefault(name, []).append(arguments[0].clone())

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for x in batches:
            block(x)
    for handle in handles:
        handle.remove()
    return seen


def test_linears_that_see_one_tensor_share_its_statistic() -> None:
    block = Block()
    batches = [normal(2, 5, 6, seed=s) for s in range(4)]
    seen = watched(block, batches)
    collector = collect(block, batches)
    assert [m.names for m in collector.moments] == [["q", "k", "v"], ["twin"], ["out"], ["down"]]
    for name, tensors in seen.items():
        moment = of(collector, name)
        assert moment.tokens == 40
        assert torch.allclose(moment.finish().double(), exact(torch.cat(tensors)), rtol=1e-5, atol=1e-5)


def test_equal_tensors_that_are_distinct_are_not_shared() -> None:
    collector = collect(Block(), [normal(1, 4, 6)])
    assert torch.equal(of(collector, "q").hessian, of(collector, "twin").hessian)
    assert of(collector, "q") is not of(collector, "twin")


def test_a_linear_that_is_called_twice_counts_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(self.b(self.a(x)))
            return y

    block = Twice()
    batches = [normal(3, 6, seed=s) for s in range(3)]
    seen = watched(block, batches)
    collector = collect(block, batches)
    assert of(collector, "a").tokens == 18
    assert torch.allclose(of(collector, "a").finish().double(), exact(torch.cat(seen["a"])), rtol=1e-5, atol=1e-5)


def test_linears_that_part_ways_in_a_later_batch_both_keep_counting() -> None:
    """``b`` shares ``a``'s input at first, then gets one of its own: its statistic must not swallow ``a``'s."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.together = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(x) + self.b(x if self.together else x + 1)
            return y

    block = Fickle()
    batches = [normal(3, 4, seed=s) for s in range(2)]
    linears = {"a": block.a, "b": block.b}
    with Collector(linears, CPU) as collector, torch.no_grad():
        collector.run(lambda: block(batches[0]), None)
        block.together = True
        collector.run(lambda: block(batches[1]), None)
    assert [m.names for m in collector.moments] == [["a"], ["b"]]
    expected = torch.cat([batches[0] + 1, batches[1]])
    assert torch.allclose(of(collector, "b").finish().double(), exact(expected), rtol=1e-5, atol=1e-5)
    assert torch.allclose(of(collector, "a").finish().double(), exact(torch.cat(batches)), rtol=1e-5, atol=1e-5)


def test_padding_never_enters() -> None:
    block = Block()
    x = normal(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    seen = watched(block, [x])
    x_bad = x.clone()
    x_bad[1, 3:] = 1e6
    collector = collect(block, [x_bad], [mask.reshape(-1)])
    for name, tensors in seen.items():
        moment = of(collector, name)
        assert moment.tokens == 8
        assert torch.allclose(moment.finish().double(), exact(tensors[0][mask]), rtol=1e-5, atol=1e-5)


def test_linears_that_no_batch_reached_are_named() -> None:
    block = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    linears = {"used": block["used"], "idle": block["idle"]}
    with Collector(linears, CPU) as collector, torch.no_grad():  # type: ignore[arg-type]
        for _ in range(3):
            collector.run(lambda: block["used"](normal(2, 4)), None)
    assert collector.never_called() == ["idle"]
    assert of(collector, "used").tokens == 6


def test_hooks_are_gone_afterwards() -> None:
    block = Block()
    collector = collect(block, [normal(2, 5, 6)] * 2)
    before = of(collector, "q").tokens
    with torch.no_grad():
        assert block(normal(2, 5, 6)).shape == (2, 5, 6)
    assert of(collector, "q").tokens == before
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_hooks_are_gone_after_an_error() -> None:
    block = Block()
    with pytest.raises(RuntimeError):
        collect(block, [normal(2, 5, 7)])
    assert not any(m._forward_pre_hooks for m in block.modules())
