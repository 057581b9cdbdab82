"""A walk through a block sees what a plain run would, and computes each Linear once.

The oracle runs the block plainly for every stage, with the Linears before it quantised (here: changed by noise).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from conftest import Models
from halfbyte.activations import fake_quantize_activations
from halfbyte.blocks import Interner, StreamedModel, run_block
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.errors import ArchitectureError
from halfbyte.schemes import ActivationFormat
from halfbyte.sequential import MOST_LINEARS, AtOnce, Norms, Route, Sequential, Shelf, find_norms, learn_route
from halfbyte.statistics import SecondMoment
from halfbyte.weights import Weights

CPU = torch.device("cpu")
INT8 = ActivationFormat(num_bits=8, kind="int")


class Plain(nn.Module):
    """Mixing, then an MLP, both added to what came in; ``attend`` returns a tuple as attention modules do."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.o(torch.tanh(self.q(x)) * self.v(x)), None

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(torch.relu(self.up(x)))
            return y

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend, self.norm2, self.mlp = nn.LayerNorm(6), self.Attend(), nn.LayerNorm(6), self.Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm(x))[0]
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y


class Parallel(nn.Module):
    """Attention and MLP beside each other on one normalised input, as in Falcon and Phi; the sum is taken in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.o = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y: torch.Tensor = self.o(torch.tanh(self.q(h)))
        y += self.down(torch.relu(self.up(h)))
        y += x
        return y


class Gated(nn.Module):
    """A norm with a gate of its own, as in Qwen 3.5's linear attention, behind a plain one."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return x / x.norm(dim=-1, keepdim=True) * self.weight * torch.sigmoid(gate)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(6), self.Norm()
        self.q, self.z, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y: torch.Tensor = x + self.o(self.inner(self.q(h), self.z(h)))
        return y


class Chain(nn.Module):
    """Low-rank queries beside low-rank keys, as in DeepSeek's attention: the second pair waits for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.qa, self.qb, self.ka, self.kb = nn.Linear(6, 4), nn.Linear(4, 8), nn.Linear(6, 4), nn.Linear(4, 8)
        self.o = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qb(torch.tanh(self.qa(x))), self.kb(torch.tanh(self.ka(x)))
        y: torch.Tensor = x + self.o(q * torch.sigmoid(k))
        return y


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def learn(block: nn.Module, x: torch.Tensor) -> Route | None:
    with torch.no_grad():
        return learn_route(block, linears_of(block), lambda: block(x))


def disturb(names: tuple[str, ...] | list[str], linears: dict[str, nn.Linear]) -> None:
    """What stands for quantising here: deterministic noise on the weights."""
    for name in names:
        weight = linears[name].weight
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def looks(block: nn.Module, run: Callable[[int], torch.Tensor], count: int) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.setdefault(n, []).append(a[0].clone()))
        for n, m in linears_of(block).items()
    ]
    for i in range(count):
        run(i)
    for handle in handles:
        handle.remove()
    return seen


def check_walk(
    make: Callable[[], tuple[nn.Module, Callable[[int], torch.Tensor]]],
    count: int,
    rows: list[torch.Tensor | None],
    shelf: Shelf,
    route: Route | None = None,
) -> Route:
    """Walk one copy of a block and run another plainly, stage after stage."""
    block, run = make()
    oracle, run_oracle = make()
    linears, plain = linears_of(block), linears_of(oracle)
    computed: list[str] = []
    with torch.no_grad():
        route = route or learn_route(block, linears, lambda: run(0))
        assert route is not None
        walk = Sequential(block, linears, route, run, rows, CPU, shelf, {})
        with pytest.MonkeyPatch.context() as patch:
            import halfbyte.sequential as module

            names = {id(m): n for n, m in linears.items()}
            original = module.linear
            patch.setattr(module, "linear", lambda m, x, f: computed.append(names[id(m)]) or original(m, x, f))
            for (moment,) in walk.moments():
                expected = looks(oracle, run_oracle, count)
                for name in moment.names:
                    reference = SecondMoment.empty(linears[name].in_features, CPU)
                    for x, real in zip(expected[name], rows, strict=True):
                        flat = x.reshape(-1, x.shape[-1])
                        reference.add(flat if real is None else flat[real])
                    assert torch.equal(moment.finish(), reference.finish()), name
                    assert moment.tokens == reference.tokens
                disturb(moment.names, linears)
                disturb(moment.names, plain)
            for i, output in enumerate(walk.outputs()):
                assert torch.equal(output, run_oracle(i))
    assert sorted(computed) == sorted(list(linears) * count), "each product is computed once a batch"
    assert not any("forward" in m.__dict__ for m in block.modules())
    assert shelf._held == {}
    assert shelf._filed == {}
    return route


def made(kind: type[nn.Module], count: int) -> Callable[[], tuple[nn.Module, Callable[[int], torch.Tensor]]]:
    def make() -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
        torch.manual_seed(0)
        block = kind()
        batches = [torch.randn(2, 5, 6) for _ in range(count)]
        return block, lambda i: block(batches[i])

    return make


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", [Plain, Parallel, Gated, Chain])
def test_a_walk_sees_what_a_plain_run_would(kind: type[nn.Module], on_disk: bool, tmp_path: Path) -> None:
    mask = torch.tensor([True] * 8 + [False] * 2)
    check_walk(made(kind, 3), 3, [None, mask, None], Shelf(tmp_path if on_disk else None))
    assert list(tmp_path.iterdir()) == []


def test_the_route_of_a_plain_block() -> None:
    route = learn(Plain(), torch.randn(2, 5, 6))
    assert route == Route(
        stages=(("attend.q", "attend.v"), ("attend.o",), ("mlp.up",), ("mlp.down",)),
        kept=frozenset({1, 3}),
        lasting=frozenset({"attend.o", "mlp.down"}),
        owners={"attend.o": ("attend", 1), "mlp.down": ("mlp", -1)},
        norms={0: "norm", 2: "norm2"},
        idle=(
            frozenset({"norm2"}),
            frozenset({"norm2"}),
            frozenset({"norm"}),
            frozenset({"norm"}),
            frozenset({"norm", "norm2"}),
        ),
    )


def test_norms_are_found_and_the_one_that_reads_the_block_s_input() -> None:
    plain, parallel, gated, chain = Plain(), Parallel(), Gated(), Chain()
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        assert find_norms(plain, lambda: plain(x)) == Norms(("norm", "norm2"), "norm")
        assert find_norms(parallel, lambda: parallel(x)) == Norms(("norm",), "norm")
        assert find_norms(gated, lambda: gated(x)) == Norms(("norm",), "norm")
        assert find_norms(chain, lambda: chain(x)) == Norms((), None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_the_route_of_a_parallel_block() -> None:
    route = learn(Parallel(), torch.randn(2, 5, 6))
    assert route is not None
    assert route.stages == (("q", "up"), ("o",), ("down",))
    assert route.lasting == {"o", "up", "down"}
    assert route.norms == {0: "norm"}
    assert route.owners == {}


def test_the_route_of_low_rank_attention() -> None:
    route = learn(Chain(), torch.randn(2, 5, 6))
    assert route is not None
    assert route.stages == (("qa", "ka"), ("qb",), ("kb",), ("o",))
    assert {"qb", "o"} <= route.lasting


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_is_walked(family: str, tiny_model: Models) -> None:
    folder = tiny_model(family)
    batches = [tiny.token_ids(folder, 40), tiny.token_ids(folder, 24)]

    def make() -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
        model = StreamedModel.of(Weights.of(open_checkpoint(folder)), CPU)
        vocabulary = torch.unique(torch.cat([b.flatten() for b in batches]))
        with model.embeddings(vocabulary):
            states = [model.embed(b, Interner()) for b in batches]
        context = model.block(0)
        block = context.__enter__()
        keep.append(context)  # its weights leave memory with it
        return block, lambda i: run_block(block, states[i][0], states[i][1][0])

    keep: list[object] = []
    route = check_walk(make, 2, [None, None], Shelf(None))
    leaves = [[n.rpartition(".")[2] for n in names] for names in route.stages]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert route.kept == {1, 3}
    assert sorted(route.norms) == [0, 2]
    assert route.owners == {"self_attn.o_proj": ("self_attn", 1), "mlp.down_proj": ("mlp", -1)}


def test_a_norm_that_others_read_too_is_not_listed() -> None:
    class Leaky(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            x = x + self.attend(h)[0] + 0.1 * h
            y: torch.Tensor = x + self.mlp(self.norm2(x))
            return y

    route = learn(Leaky(), torch.randn(2, 5, 6))
    assert route is not None
    assert route.norms == {2: "norm2"}


def test_what_is_kept_is_reckoned() -> None:
    block = Plain()
    route = learn(block, torch.randn(2, 5, 6))
    assert route is not None
    # the fullest pass is the last observed: o's output (6) and down's input (10)
    assert route.kept_bytes(linears_of(block), tokens=10, itemsize=4) == 10 * 4 * 16


def test_a_linear_called_twice_has_no_route() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(self.a(x))
            return y

    assert learn(Twice(), torch.randn(2, 6)) is None


def test_too_many_linears_have_no_route() -> None:
    block = nn.Sequential(*[nn.Linear(2, 2) for _ in range(MOST_LINEARS + 1)])
    assert learn(block, torch.randn(2, 2)) is None


def test_another_order_in_a_later_batch_is_an_error() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.swapped = nn.Linear(6, 6), nn.Linear(6, 6), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(self.b(x)) if self.swapped else self.b(self.a(x))
            return y

    block, x = Fickle(), torch.randn(2, 6)
    route = learn(block, x)
    assert route is not None

    def run(batch: int) -> torch.Tensor:
        block.swapped = batch == 1
        y: torch.Tensor = block(x)
        return y

    walk = Sequential(block, linears_of(block), route, run, [None, None], CPU, Shelf(None), {})
    with torch.no_grad(), pytest.raises(ArchitectureError, match=r"batch 1 .* another order"):
        next(walk.moments())


def test_quantised_activations_are_seen_after_solving() -> None:
    """Both walks end in what the block gives when its solved Linears round their inputs."""
    make = made(Plain, 2)
    for at_once in (False, True):
        block, run = make()
        oracle, run_oracle = make()
        linears = linears_of(block)
        formats = dict.fromkeys(linears, INT8)
        rows: list[torch.Tensor | None] = [None, None]
        for module in linears_of(oracle).values():
            module.register_forward_pre_hook(lambda _, a: (fake_quantize_activations(a[0], INT8),))
        with torch.no_grad():
            route = learn_route(block, linears, lambda run=run: run(0))  # type: ignore[misc]
            assert route is not None
            walk = (
                AtOnce(run, rows, linears, CPU, formats)
                if at_once
                else Sequential(block, linears, route, run, rows, CPU, Shelf(None), formats)
            )
            assert sorted(n for (m,) in walk.moments() for n in m.names) == sorted(linears)
            for i, output in enumerate(walk.outputs()):
                assert torch.equal(output, run_oracle(i))
                assert not torch.equal(output, run(i))
