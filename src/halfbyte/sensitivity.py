"""What rounding one unit of mixed precision does to the model's predictions, measured for all units in one pass.

For a unit ``u`` and the original model's next-token distributions ``P``::

    KL_u = mean over positions of KL(P || P_u)

(up to 256 positions, spread evenly over the text, the same for all units), where ``P_u`` is the model with u's Linears
rounded to the recipe's scheme and everything else original. Weights are streamed once: the original's hidden states
travel through the blocks, at u's block u's are split off from them, and from there on both travel side by side. So
memory holds one block and, for every unit, the hidden states of a few sequences (on disk with ``offload``). The work is
that of half as many forward passes of these few sequences as there are units, and the output head for each.

Two things are assumed, and not measured: that the divergences of units add up, and that a unit in 8 bits has none. An
8-bit grid is 17 times finer than a 4-bit one of the same range, and KL is quadratic in small errors, so that what is
left out is about a 300th of what is measured.

Rounding is to nearest: with GPTQ to follow, on scales searched by the error weighted with the mean square of each input
(as ``methods.scales`` does it); with method rtn, as that method rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from halfbyte.blocks import Interner, StreamedModel, require_finite, require_finite_weights, run_block
from halfbyte.calibration import Batch, Calibration
from halfbyte.checkpoint.layout import write_error
from halfbyte.checkpoint.reader import DTYPES
from halfbyte.distributions import kl_rows
from halfbyte.errors import CalibrationError, NumericsError
from halfbyte.estimates import LOGITS_BYTES, MEASURED_POSITIONS
from halfbyte.heap import release_freed_memory
from halfbyte.methods.rtn import nearest, quantize_rtn
from halfbyte.methods.scales import searched
from halfbyte.mixing import MEASURED_SEQ_LEN, Budget, Unit, choose, measured_sequences
from halfbyte.packing import dequantize
from halfbyte.progress import Reporter
from halfbyte.recipe import WIDER, wider
from halfbyte.records import Sensitivity, UnitSensitivity, read_record, write_json
from halfbyte.schemes import Scheme, WeightFormat
from halfbyte.state import HiddenStates

RECORD_NAME = "sensitivity.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``kl_nats`` of each unit, in their order, and the text they come from."""

    kl_nats: list[float]
    sequences: int
    tokens: int
    positions: int


def deal_out(
    model: StreamedModel,
    budget: Budget,
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    folder: Path,
    *,
    offload: bool,
    search: bool,
    reporter: Reporter,
) -> Sensitivity:
    """Measure, choose, and keep the outcome in ``folder``, from where it is taken when a run is resumed.

    Arguments are those of :func:`measure`.
    """
    kept = folder / RECORD_NAME
    if kept.exists():
        return read_record(Sensitivity, kept)
    units = budget.units
    measured = measure(model, units, schemes, calibration, folder, offload=offload, search=search, reporter=reporter)
    chosen = choose(measured.kl_nats, [u.extra_bytes for u in units], budget.extra_bytes)
    found = Sensitivity(
        target_bits=budget.target_bits,
        bits_per_weight=budget.reached_bits(chosen),
        sequences=measured.sequences,
        tokens=measured.tokens,
        positions=measured.positions,
        units=[
            record_of(u, kl, schemes, i in chosen)
            for i, (u, kl) in enumerate(zip(units, measured.kl_nats, strict=True))
        ],
    )
    try:
        write_json(kept, found)
    except OSError as e:
        raise write_error(e, kept, 0) from None
    worst = max(found.units, key=lambda u: u.kl_nats)
    reporter.say(
        f"mixed precision: {len(chosen)} of {len(units)} units in {WIDER}, {found.bits_per_weight:.3f} bits a weight "
        f"(target {found.target_bits:g}); most sensitive: {', '.join(worst.linears[:3])} ({worst.kl_nats:.2e} nats)"
    )
    return found


def record_of(unit: Unit, kl_nats: float, schemes: Mapping[str, Scheme], chosen: bool) -> UnitSensitivity:
    """What was measured of a unit, and what it got."""
    own = schemes[unit.linears[0]]
    scheme = (wider(own) or own) if chosen else own
    return UnitSensitivity(
        linears=list(unit.linears),
        block=unit.block,
        kl_nats=kl_nats,
        scheme=scheme.name,
        group_size=scheme.weights.group_size,
        bits_per_weight=8 * (unit.wider_bytes if chosen else unit.size_bytes) / unit.weights,
    )


@dataclass(frozen=True, slots=True)
class Text:
    """The few sequences that are measured on.

    Attributes:
        batch: their tokens; samples: their numbers in the calibration set.
        real: which of the batch's positions are tokens.
        positions: where predictions are compared, in the flattened batch.
    """

    batch: Batch
    samples: list[int]
    real: torch.Tensor
    positions: torch.Tensor

    @staticmethod
    def of(calibration: Calibration, units: int) -> Text:
        """The longest sequences without pictures of a calibration set, cut to :data:`MEASURED_SEQ_LEN` tokens."""
        order = sorted(calibration.texts, key=lambda i: -len(calibration.sequences[i]))
        if not order:
            raise CalibrationError(
                "every sample has pictures, and sensitivities are measured on text",
                where=calibration.record.spec,
                remedy="Mix in some text, as in text:FILE*0.2+vlm:FOLDER*0.8, or leave --target-bits out.",
            )
        samples = order[: measured_sequences(units)]
        cut = [calibration.sequences[i][:MEASURED_SEQ_LEN] for i in samples]
        (batch,) = Calibration(record=calibration.record, sequences=cut).batches(MEASURED_SEQ_LEN * len(cut))
        real = torch.arange(batch.token_ids.shape[1]) < batch.lengths.unsqueeze(1)
        tokens = torch.nonzero(real.flatten())[:, 0]
        count = min(MEASURED_POSITIONS, len(tokens))
        return Text(batch, samples, real, tokens[torch.arange(count) * len(tokens) // count])


def measure(
    model: StreamedModel,
    units: Sequence[Unit],
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    folder: Path,
    *,
    offload: bool,
    search: bool,
    reporter: Reporter,
) -> Measured:
    """Measure the sensitivity of every unit.

    Args:
        model: of the original weights.
        units: in the order of their blocks.
        schemes: what each of their Linears is rounded to; symmetric integers.
        calibration: the longest few of its sequences are used.
        folder: where hidden states are kept with ``offload``.
        offload: keep hidden states on disk only.
        search: search scales by weighted error; else they are taken from the range.
        reporter: hears progress.

    Raises:
        NumericsError: a weight or a hidden state of the original model is not finite, or a divergence.
    """
    text = Text.of(calibration, len(units))
    width = int(model.weights.checkpoint.text_config["hidden_size"])
    rows, longest = text.batch.token_ids.shape
    states = HiddenStates(folder, [(rows, longest)] * (len(units) + 1), width, model.dtype, offload, "unit")
    _travel(model, units, schemes, text, states, search=search, reporter=reporter)
    sums = _divergences(model, len(units), text, states, reporter)
    states.forget(model.num_blocks)
    kl = [float(s) / len(text.positions) for s in sums]
    for unit, value in zip(units, kl, strict=True):
        if not 0 <= value < float("inf"):
            raise NumericsError(
                f"the divergence that rounding it causes is {value}",
                where=unit.linears[0],
                remedy="Calibrate with other text, or leave --target-bits out.",
            )
    return Measured(kl_nats=kl, sequences=rows, tokens=int(text.real.sum()), positions=len(text.positions))


def _travel(
    model: StreamedModel,
    units: Sequence[Unit],
    schemes: Mapping[str, Scheme],
    text: Text,
    states: HiddenStates,
    *,
    search: bool,
    reporter: Reporter,
) -> None:
    """Take the original's hidden states (slot 0) and each unit's (slot 1 + its number) through all blocks."""
    with model.embeddings(torch.unique(text.batch.token_ids)):
        hidden, calls = model.embed(text.batch.token_ids, Interner())
    states.write(0, hidden, stage=0)
    born = 1
    reporter.start("measuring sensitivities: blocks", model.num_blocks)
    for index in range(model.num_blocks):
        with model.block(index) as block:
            linears = model.linears(index)
            own = {n: linears[n] for u in units if u.block == index for n in u.linears}
            require_finite_weights(own)
            entering = states.read(0).to(model.device, model.dtype)
            with squares_of_inputs(own, text.real.flatten()) as squares:
                output = run_block(block, entering, calls[index])
            require_finite(block, f"{model.disk_prefix}.{index}", entering, output, calls[index], text.samples)
            for slot in range(1, born):
                travelled = run_block(block, states.read(slot).to(model.device, model.dtype), calls[index])
                states.write(slot, travelled, stage=index + 1)
            states.write(0, output, stage=index + 1)
            for unit in (u for u in units if u.block == index):
                with rounded(model, {n: own[n] for n in unit.linears}, schemes, squares if search else None):
                    states.write(born, run_block(block, entering, calls[index]), stage=index + 1)
                born += 1
        release_freed_memory()
        states.turn(index + 1)
        states.forget(index)
        reporter.advance()
    reporter.finish()


@contextlib.contextmanager
def squares_of_inputs(linears: Mapping[str, nn.Linear], real: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of ``x_j^2 [in]`` over real positions of what each Linear is called with; none for one that is not."""
    sums: dict[str, torch.Tensor] = {}
    handles = []

    def watch(name: str, module: nn.Linear) -> None:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            x = x[real] if x.shape[0] == real.shape[0] else x  # experts see some tokens, in another order
            sums[name] = sums.get(name, torch.zeros(x.shape[1])) + x.float().square().sum(0).cpu()

        handles.append(module.register_forward_pre_hook(hook))

    for name, module in linears.items():
        watch(name, module)
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def rounded(
    model: StreamedModel,
    linears: Mapping[str, nn.Linear],
    schemes: Mapping[str, Scheme],
    squares: Mapping[str, torch.Tensor] | None,
) -> Iterator[None]:
    """Linears with rounded weights; with their own again on leaving."""
    kept = {name: module.weight.data for name, module in linears.items()}
    try:
        for name, module in linears.items():
            dtype = DTYPES[model.weights.checkpoint.tensors[f"{name}.weight"].dtype]
            importance = None if squares is None else squares.get(name, torch.zeros(module.in_features))
            weight = kept[name].float().cpu()
            module.weight.data = nearest_values(weight, schemes[name].weights, dtype, importance).to(kept[name])
        yield
    finally:
        for name, module in linears.items():
            module.weight.data = kept[name]


def nearest_values(
    weight: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype, importance: torch.Tensor | None
) -> torch.Tensor:
    """A weight ``[out, in]`` float32 rounded to a format: on searched scales, or with no ``importance [in]`` from the
    range. Inputs that were never seen all count alike."""
    if importance is None:
        return quantize_rtn(weight, fmt, dtype).dense()
    seen = importance if bool(importance.any()) else torch.ones_like(importance)
    scales, zeros = searched(weight, seen, fmt, dtype)
    return dequantize(nearest(weight, scales, zeros, fmt), scales, None)


def _divergences(
    model: StreamedModel, units: int, text: Text, states: HiddenStates, reporter: Reporter
) -> torch.Tensor:
    """Sums of KL over the positions ``[units]`` float64, a chunk of them at a time."""
    vocabulary = int(model.weights.checkpoint.text_config["vocab_size"])
    sums = torch.zeros(units, dtype=torch.float64)
    chunks = torch.split(text.positions, max(1, LOGITS_BYTES // (4 * vocabulary)))
    reporter.start("measuring sensitivities: predictions", len(chunks) * units)
    model = replace(model, dtype=torch.float32)  # logits rounded to bfloat16 would drown small divergences
    with model.head():
        for chunk in chunks:
            p = _logits(model, states, 0, chunk)
            for unit in range(units):
                sums[unit] += kl_rows(p, _logits(model, states, unit + 1, chunk)).sum()
                reporter.advance()
    reporter.finish()
    return sums


def _logits(model: StreamedModel, states: HiddenStates, slot: int, positions: torch.Tensor) -> torch.Tensor:
    hidden = states.read(slot).flatten(0, 1)[positions]
    return model.logits(hidden.to(model.device, model.dtype)[None])[0]
