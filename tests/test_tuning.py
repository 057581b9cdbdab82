"""Block tuning against its definitions: where it starts, what its gradients are, what it may return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.activations import fake_quantize_activations
from halfbyte.blocks import Arguments
from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.rtn import nearest, quantize_rtn
from halfbyte.methods.scales import minmax
from halfbyte.methods.tuned_parts import LinearState, TunedLinear, TunedVector, VectorState
from halfbyte.methods.tuning import (
    Sample,
    TuningOptions,
    TuningResult,
    divide,
    loss_of,
    mean_loss,
    norm_gain,
    tune_block,
)
from halfbyte.schemes import ActivationFormat, WeightFormat

HIDDEN, INNER, TOKENS = 16, 32, 12
FORMATS = {
    "symmetric": WeightFormat(num_bits=4, group_size=8),
    "asymmetric": WeightFormat(num_bits=4, symmetric=False, group_size=8),
    "channel": WeightFormat(num_bits=8),
}
CODES_ONLY = TuningOptions(steps=40, samples_per_step=2, code_rate=0.05, scale_rate=0.0, vector_rate=0.0)


class Block(nn.Module):
    """A norm and two Linears around a nonlinearity, added to the stream; returns a tuple, as some blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor, gain: float, *, shift: float = 0.0) -> tuple[torch.Tensor]:
        return (hidden + gain * self.down(nn.functional.gelu(self.up(self.norm(hidden)))) + shift,)


class Case:
    """A block rounded to nearest, and samples of what enters it and what should leave."""

    def __init__(self, fmt: WeightFormat, *, samples: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(7)
        self.fmt, self.dtype, self.block = fmt, dtype, Block().requires_grad_(False)
        for parameter in self.block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
        x = torch.randn(samples, 2, TOKENS, HIDDEN, generator=generator)
        noisy = x + 0.05 * torch.randn(x.shape, generator=generator)
        targets = self.block(x, 1.5, shift=0.1)[0]
        self.samples = [sample(noisy[i], targets[i]) for i in range(samples)]
        self.linears = {f"model.{n}": self.rounded(getattr(self.block, n)) for n in ("up", "down")}
        self.vectors = {"model.norm.weight": TunedVector(module=self.block.norm, leaf="weight", dtype=dtype)}

    def rounded(self, module: nn.Linear) -> TunedLinear:
        weight = module.weight.detach().clone()
        quantized = quantize_rtn(weight, self.fmt, self.dtype)
        return TunedLinear(module=module, weight=weight, quantized=quantized, fmt=self.fmt, scale_dtype=self.dtype)

    def tune(self, options: TuningOptions, *, vectors: bool = False) -> TuningResult:
        return tune_block(self.block, self.linears, self.samples, options, self.vectors if vectors else None)


def sample(hidden: torch.Tensor, target: torch.Tensor, rows: torch.Tensor | None = None) -> Sample:
    return Sample(
        hidden=lambda: hidden.clone(),
        target=lambda: target.clone(),
        run=Arguments((1.5,), {"shift": 0.1}).run,
        rows=rows,
    )


def plain(weight: torch.Tensor, codes: torch.Tensor, fmt: WeightFormat) -> TunedLinear:
    """A Linear with scales of the range and the given codes."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    scales, _ = minmax(weight, fmt, torch.bfloat16)
    quantized = QuantizedWeight(codes=codes, scales=scales.to(torch.bfloat16), zero_points=None, relative_error=0.25)
    return TunedLinear(module=module, weight=weight, quantized=quantized, fmt=fmt, scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("tune_codes", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_starts_exactly_at_the_given_codes(name: str, tune_codes: bool) -> None:
    """Whatever the codes are, also far from the nearest and at the ends of the range."""
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 16, generator=generator)
    codes = torch.randint(fmt.q_min, fmt.q_max + 1, weight.shape, generator=generator).to(torch.int8)
    given = plain(weight, codes, fmt)
    if not fmt.symmetric:
        zeros = torch.randint(fmt.q_min, fmt.q_max + 1, (6, 2), generator=generator).to(torch.int8)
        given = replace(given, quantized=replace(given.quantized, zero_points=zeros))
    state = LinearState.of(given, tune_codes=tune_codes)
    state.place()
    assert torch.equal(state.codes(), codes)
    assert torch.equal(given.module.weight, given.quantized.dense())
    result = state.result()
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.scales, given.quantized.scales)
    assert result.scales.dtype == torch.bfloat16
    assert result.zero_points is given.quantized.zero_points


def test_latents_lie_in_their_cells_on_the_side_of_the_weight() -> None:
    fmt = WeightFormat(num_bits=4)
    weight = torch.tensor([[7.5, 2.3, 2.3, -1.0]])  # the scale is 1
    state = LinearState.of(plain(weight, torch.tensor([[7, 2, 4, -3]], dtype=torch.int8), fmt), tune_codes=True)
    assert state.latent is not None
    assert torch.allclose(state.latent, torch.tensor([[7.49, 2.3, 3.51, -2.51]]))


def gradient_of(state: LinearState | VectorState) -> torch.Tensor:
    state.absorb()
    assert state.ratio.grad is not None
    return state.ratio.grad


def test_codes_are_tuned_from_the_original_weight() -> None:
    case = Case(FORMATS["symmetric"])
    case.linears = {n: replace(spec, weight=None) for n, spec in case.linears.items()}
    case.tune(TuningOptions(steps=2, code_rate=0.0))
    with pytest.raises(ValueError, match=r"give TunedLinear\.weight"):
        case.tune(CODES_ONLY)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_of_scales_match_finite_differences(name: str) -> None:
    case = Case(FORMATS[name], dtype=torch.float32)
    states = [LinearState.of(spec, tune_codes=False) for spec in case.linears.values()]
    for state in states:
        state.ratio += 0.03 * torch.randn(state.ratio.shape, generator=torch.Generator().manual_seed(2))
        state.place()
        state.parameter().requires_grad_(True)
    loss_of(case.block, case.samples[0]).backward()  # type: ignore[no-untyped-call]
    slopes = [gradient_of(state) for state in states]
    step = 2e-3
    for state, slope in zip(states, slopes, strict=True):
        for i in range(0, state.ratio.numel(), 7):
            values = []
            for sign in (1.0, -1.0):
                state.ratio.view(-1)[i] += sign * step
                state.place()
                values.append(mean_loss(case.block, case.samples[:1]))
                state.ratio.view(-1)[i] -= sign * step
            state.place()
            measured = (values[0] - values[1]) / (2 * step)
            assert measured == pytest.approx(float(slope.view(-1)[i]), rel=0.02, abs=2e-5)


def test_gradients_of_vectors_match_finite_differences() -> None:
    case = Case(FORMATS["symmetric"], dtype=torch.float32)
    state = VectorState.of(case.vectors["model.norm.weight"])
    state.parameter().requires_grad_(True)
    loss_of(case.block, case.samples[0]).backward()  # type: ignore[no-untyped-call]
    slope, step = gradient_of(state), 2e-3
    for i in range(HIDDEN):
        values = []
        for sign in (1.0, -1.0):
            state.ratio[i] = sign * step
            state.place()
            values.append(mean_loss(case.block, case.samples[:1]))
        state.ratio[i] = 0.0
        state.place()
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(slope[i]), rel=0.02, abs=2e-5)


def test_latents_move_against_the_sign_of_the_weights_gradient_and_no_further_than_the_range() -> None:
    fmt = WeightFormat(num_bits=4)
    state = LinearState.of(
        plain(torch.tensor([[7.5, 2.3, -1.0]]), torch.tensor([[7, 2, -1]], dtype=torch.int8), fmt), tune_codes=True
    )
    assert state.latent is not None
    before = state.latent.clone()
    for part in ([[-4.0, 2.001, 1.0]], [[1.0, -2.0, -1.0]]):  # two samples of one step
        state.parameter().grad = torch.tensor(part)
        state.absorb()
        assert state.parameter().grad is None
    state.descend(0.25)
    assert torch.allclose(state.latent - before, torch.tensor([[0.01, -0.25, 0.0]]), atol=1e-6)
    state.parameter().grad = torch.tensor([[-1.0, 1.0, 1.0]])
    state.absorb()
    state.descend(100.0)
    assert state.codes().tolist() == [[7, -8, -8]]


def test_finds_the_optimum_of_a_block_that_one_code_spoils() -> None:
    """The target is made with codes q; the start has single codes one off; only q has loss 0."""
    fmt = WeightFormat(num_bits=4)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 8, generator=generator)
    scales, zeros = minmax(weight, fmt, torch.bfloat16)
    codes = nearest(weight, scales, zeros, fmt)
    spoilt = codes.clone()
    for row, column in enumerate((3, 1, 6, 4)):
        spoilt[row, column] += 1 if spoilt[row, column] < fmt.q_max else -1
    given = plain(weight, spoilt, fmt)
    block = nn.Sequential(given.module)
    x = torch.randn(16, 2, 64, 8, generator=generator)
    given.module.weight.data.copy_(codes.float() * scales)
    samples = [replace(sample(h, block(h)), run=Arguments((), {}).run) for h in x]
    result = tune_block(block, {"0": given}, samples, replace(CODES_ONLY, steps=100))
    assert result.kept
    assert result.loss_after == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(result.weights["0"].codes, codes)


def test_finds_scales_that_were_off() -> None:
    """Scales 5 % too large everywhere come back to the stored value of the right ones, or its neighbour."""
    fmt = WeightFormat(num_bits=4)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 8, generator=generator)
    right = plain(weight, torch.randint(-8, 8, (4, 8), generator=generator).to(torch.int8), fmt)
    off = replace(right.quantized, scales=(right.quantized.scales.float() * 1.05).to(torch.bfloat16))
    block = nn.Sequential(right.module)
    right.module.weight.data.copy_(right.quantized.dense())
    samples = [
        replace(sample(h, block(h)), run=Arguments((), {}).run) for h in torch.randn(16, 2, 64, 8, generator=generator)
    ]
    options = TuningOptions(steps=200, code_rate=0.0, scale_rate=3e-3)
    result = tune_block(block, {"0": replace(right, quantized=off)}, samples, options)
    tuned = result.weights["0"]
    assert torch.equal(tuned.codes, right.quantized.codes)
    ratio = tuned.scales.float() / right.quantized.scales.float()
    assert float((ratio - 1).abs().max()) <= 2.0**-7
    assert result.loss_after < 0.02 * result.loss_before


@pytest.mark.parametrize("name", FORMATS)
def test_tunes_a_block_within_its_format(name: str) -> None:
    """Better on samples never tuned on, codes in range, scales as stored, and the block holds what is returned."""
    case = Case(FORMATS[name])
    options = TuningOptions(steps=40, code_rate=0.02, scale_rate=5e-4, vector_rate=2e-3)
    result = case.tune(options, vectors=True)
    assert result.kept
    assert result.loss_after < result.loss_before
    for linear_name, spec in case.linears.items():
        tuned = result.weights[linear_name]
        assert tuned.codes.dtype == torch.int8
        assert int(tuned.codes.min()) >= case.fmt.q_min
        assert int(tuned.codes.max()) <= case.fmt.q_max
        assert tuned.scales.dtype == torch.bfloat16
        assert bool((tuned.scales > 0).all())
        assert torch.equal(spec.module.weight, tuned.dense())
    (norm,) = result.vectors.values()
    assert norm.dtype == torch.bfloat16
    assert torch.equal(case.block.norm.weight, norm.float())
    _, judges = divide(case.samples, options.held_out)
    assert mean_loss(case.block, judges) == result.loss_after
    assert not any(p.requires_grad or p.grad is not None for p in case.block.parameters())


@pytest.mark.parametrize("rate", [1e-9, 5.0])
def test_never_worse_on_what_is_held_out(rate: float) -> None:
    """Rates that change nothing, and rates that ruin everything: what was given comes back."""
    case = Case(FORMATS["symmetric"])
    norm = case.block.norm.weight.clone()
    result = case.tune(TuningOptions(steps=5, code_rate=rate, scale_rate=rate, vector_rate=rate), vectors=True)
    assert not result.kept
    assert result.loss_after >= result.loss_before
    assert result.vectors == {}
    for name, spec in case.linears.items():
        assert result.weights[name] is spec.quantized
        assert torch.equal(spec.module.weight, spec.quantized.dense())
    assert torch.equal(case.block.norm.weight, norm)


def test_same_arguments_same_bytes() -> None:
    """Also where the caller has gradients switched off."""
    options = TuningOptions(steps=12, code_rate=0.05, scale_rate=2e-3)
    first, other = (Case(FORMATS["symmetric"]).tune(replace(options, seed=s)) for s in (3, 4))
    with torch.no_grad():
        second = Case(FORMATS["symmetric"]).tune(replace(options, seed=3))
    assert first.loss_after == second.loss_after != other.loss_after
    for name in first.weights:
        assert torch.equal(first.weights[name].codes, second.weights[name].codes)
        assert torch.equal(first.weights[name].scales, second.weights[name].scales)


def test_padding_has_no_say() -> None:
    """Padded positions may hold anything: the outcome is that of the real rows."""
    rows = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [5]])).flatten()
    results = []
    for rubbish in (0.0, 1e3):
        case = Case(FORMATS["symmetric"])
        for i, s in enumerate(case.samples):
            hidden, target = s.hidden().flatten(0, 1), s.target().flatten(0, 1)
            hidden[~rows] = rubbish
            target[~rows] = -rubbish
            shape = (2, TOKENS, HIDDEN)
            case.samples[i] = sample(hidden.view(shape), target.view(shape), rows)
        results.append(case.tune(replace(CODES_ONLY, steps=10)))
    assert results[0].loss_before == pytest.approx(results[1].loss_before, rel=1e-6)
    assert results[0].loss_after == pytest.approx(results[1].loss_after, rel=1e-6)
    for name in results[0].weights:
        assert torch.equal(results[0].weights[name].codes, results[1].weights[name].codes)


def test_loss_is_the_mean_of_relative_errors_token_by_token() -> None:
    case = Case(FORMATS["symmetric"])
    rows = torch.tensor([True] * 5 + [False] * 19)
    s = replace(case.samples[0], rows=rows)
    out, target = case.block(s.hidden(), 1.5, shift=0.1)[0][0, :5].double(), s.target()[0, :5].double()
    expected = sum(float((o - t).norm() ** 2 / t.norm() ** 2) for o, t in zip(out, target, strict=True)) / 5
    assert float(loss_of(case.block, s)) == pytest.approx(expected, rel=1e-5)


def test_channels_count_by_the_gain_of_the_norm_behind() -> None:
    case = Case(FORMATS["symmetric"])
    s, gain = case.samples[0], torch.linspace(0.0, 3.0, HIDDEN)
    out, target = case.block(s.hidden(), 1.5, shift=0.1)[0].double(), s.target().double()
    expected = ((gain * (out - target)).square().sum(-1) / target.square().sum(-1)).mean()
    assert float(loss_of(case.block, s, gain)) == pytest.approx(float(expected), rel=1e-5)
    result = tune_block(case.block, case.linears, case.samples, TuningOptions(steps=40), gain=gain)
    assert result.kept
    _, judges = divide(case.samples, 8)
    assert result.loss_after == mean_loss(case.block, judges, gain)


class OnePlus(nn.Module):
    """Gemma's way: the gain is stored less 1."""

    def __init__(self, gain: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


@pytest.mark.parametrize("norm", [nn.RMSNorm(HIDDEN, eps=1e-6), nn.LayerNorm(HIDDEN), OnePlus(torch.ones(HIDDEN))])
def test_gain_of_a_norm(norm: nn.Module) -> None:
    gain = torch.linspace(-1.0, 4.0, HIDDEN)
    for name, parameter in norm.named_parameters():
        parameter.data = torch.full((HIDDEN,), 0.7) if name == "bias" else gain - float(isinstance(norm, OnePlus))
    assert torch.allclose(norm_gain(norm, HIDDEN), gain, atol=1e-4)


def test_activations_are_quantised_in_the_forward_pass_alone() -> None:
    """W8A8: Linears see rounded inputs, gradients pass as if they had not been."""
    fmt, activations = WeightFormat(num_bits=8), ActivationFormat(num_bits=8)
    case = Case(fmt)
    seen: list[torch.Tensor] = []

    def rounded(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return fake_quantize_activations(x, activations)

    plain_loss = case.tune(replace(CODES_ONLY, steps=0)).loss_before
    case.linears = {n: replace(spec, quantize_input=rounded) for n, spec in case.linears.items()}
    result = case.tune(replace(CODES_ONLY, steps=20, code_rate=0.1))
    assert result.loss_before != plain_loss
    assert seen
    assert not any(x.requires_grad for x in seen)
    assert result.kept
    assert result.loss_after < result.loss_before
    assert not any(m._forward_pre_hooks for m in case.block.modules())


@pytest.mark.parametrize(("samples", "held_out", "judges"), [(16, 8, [4, 12]), (5, 8, [4]), (2, 8, [1]), (1, 8, [])])
def test_division_of_samples(samples: int, held_out: int, judges: list[int]) -> None:
    given = [sample(torch.zeros(1), torch.zeros(1)) for _ in range(samples)]
    taught, judging = divide(given, held_out)
    assert [given.index(s) for s in judging] == judges
    assert len(taught) == samples - len(judges)


def test_one_sample_is_not_tuned_on() -> None:
    case = Case(FORMATS["symmetric"], samples=1)
    result = case.tune(CODES_ONLY)
    assert not result.kept


def test_samples_are_read_one_at_a_time() -> None:
    """Hidden states are asked for when their turn comes, and not kept."""
    case = Case(FORMATS["symmetric"])
    reads: list[int] = []

    def counted(i: int, read: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            reads.append(i)
            return read()

        return call

    case.samples = [replace(s, hidden=counted(i, s.hidden)) for i, s in enumerate(case.samples)]
    case.tune(replace(CODES_ONLY, steps=7, samples_per_step=2))
    learning = reads[2:-2]
    assert reads[:2] == reads[-2:] == [4, 12]
    assert len(learning) == len(set(learning)) == 14
