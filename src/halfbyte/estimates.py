"""What a run will need: peak memory, time and disk, each with the reckoning behind it.

Memory is what the pipeline holds at its fullest moment. Five kinds of moment compete, and the largest counts:

- the model writes its own calibration text (``self`` only): the whole model in float32, its key-value cache, logits;
- its tokenizer is loaded: more than a block, for small models with large vocabularies;
- a Hessian of width ``n`` is factored: the block's weights, codes so far, what waits for the stages to come (see
  ``sequential``), H (4 n^2 bytes) and its factor with room to work (6 n^2 in float32; twice as much in the float64 that
  little damping asks for);
- sensitivities are measured (``target_bits`` only): a block, a hidden state for each unit, then the output head;
- a Linear of N weights is solved: the same with H and R instead (8 n^2), the weight in the order of its columns or its
  error, codes in both orders (6 N in all), a strip of rows three times and the scale search's candidates.

Time is arithmetic at a rate measured now. Peaks stand beside measured ones in docs/benchmarks.md; times do not yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from halfbyte.architectures import EXPERT_MODULE, FUSED, NOT_LANGUAGE
from halfbyte.attention import STRIP as QUERIES
from halfbyte.calibration import (
    available_memory_bytes,
    local_processes,
    may_have_pictures,
    self_writing_bytes,
    tokens_per_batch,
    writes_itself,
)
from halfbyte.checkpoint.reader import DTYPES, Checkpoint
from halfbyte.kernels.general import STRIP
from halfbyte.methods.batching import worthwhile
from halfbyte.methods.scales import CANDIDATES_PER_CALL, SHRINK_FEW_BITS
from halfbyte.methods.tuning import EndToEndOptions, TuningOptions, samples_wanted
from halfbyte.records import Estimate, TensorPlan

# What measured peaks hold besides tensors: imports, the module tree, compiled kernels, the C library's heap.
RUNTIME_BYTES = 620e6
# Measured while loading Gemma 3's vocabulary of 262,144.
TOKENIZER_BYTES = 2e3
DISK_BYTES_PER_S = 400e6
# Positions at which predictions are compared to measure sensitivities: a large vocabulary makes each dearer than a pass
# through the blocks of a small model.
MEASURED_POSITIONS = 256
# Of one chunk of positions, while predictions are compared.
LOGITS_BYTES = 128 << 20
# What configs call the number of experts that a token is sent to.
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
# A block's experts stay in memory as long as the block does, up to so many bytes; more are fetched one by one.
RESIDENT_EXPERTS = 4 << 30
# Hessians of one group of experts, beside their factors; what a batch of experts may take while it is solved.
GROUP_BYTES = 512 << 20
MOST_IN_GROUP = 64
BATCH_BYTES = 1 << 30
# What may wait in memory between the stages of a block; more goes to files.
KEPT_IN_MEMORY = 1 << 30
# Of the memory that is free; the rest is the page cache's and everybody else's.
MEMORY_SHARE = 0.8
# Sampling multiplies by few rows at a time. One demo (SmolLM2-135M, 48 rows, 18,432 tokens) took 79 s for it, which is
# 0.3 of the rate of square matrices measured later on the same machine; rough.
SAMPLING_SHARE = 0.3
WRITING = "the model writes its calibration text"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationWork:
    """Which calibration there will be and how much.

    Attributes:
        spec: ``self``, ``text:FILE``, ...; ``None`` where the method needs none.
        samples, seq_len: sequences, and most tokens in one; 0 where the method needs none.
        observed: whether the method looks at what they make of the blocks; without, they only serve to measure
            sensitivities.
        offload: hidden states stay on disk; ``None`` until it is known whether they fit.
        dtype: what blocks compute in.
        tuning: how blocks are tuned; ``None`` where they are not.
        end_to_end: how all scales are tuned together at the end; ``None`` where they are not.
        units, measured_tokens: whose sensitivities are measured, and on how many tokens; 0 where that is not wanted.
        reason: why the spec is not the one that would be taken where memory is plenty; empty mostly.
    """

    spec: str | None
    samples: int
    seq_len: int
    observed: bool = True
    offload: bool | None = None
    dtype: torch.dtype = torch.float32
    tuning: TuningOptions | None = None
    end_to_end: EndToEndOptions | None = None
    units: int = 0
    measured_tokens: int = 0
    reason: str = ""

    @property
    def tokens(self) -> int:
        """What is seen of every block."""
        return self.samples * self.seq_len if self.observed else 0

    @property
    def batch_tokens(self) -> int:
        """Tokens in one batch: whole samples, at least one."""
        return min(self.tokens, self._batch_samples * self.seq_len)

    @property
    def taught_tokens(self) -> float:
        """Those whose hidden states in the original model are kept too, to tune blocks by."""
        if self.tuning is None or not self.tokens:
            return 0.0
        batches = -(-self.samples // self._batch_samples)
        return self.tokens * samples_wanted(self.tuning, batches) / batches

    @property
    def _batch_samples(self) -> int:
        most = tokens_per_batch("cpu", tuned=self.tuning is not None)
        return max(1, most // max(1, self.seq_len))

    @property
    def compute(self) -> str:
        """The dtype by name."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Shared:
    """Linears of one block with one input.

    Attributes:
        shapes: of their weights; scales: the most that one of them has.
        share: of the tokens, what reaches them; 1 but for experts.
        expert: whether they are an expert's.
    """

    shapes: tuple[tuple[int, ...], ...]
    scales: int
    share: float = 1.0
    expert: bool = False

    @property
    def width(self) -> int:
        return self.shapes[0][1]

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def largest(self) -> int:
        return max(rows * columns for rows, columns in self.shapes)


def estimate(
    checkpoint: Checkpoint, tensors: Iterable[TensorPlan], size: CalibrationWork, after: int
) -> dict[str, Estimate]:
    """Peak memory, time and disk of a planned run on the CPU.

    Args:
        checkpoint: the source; its config and size are used.
        tensors: the plan's tensors, in the checkpoint's order.
        size: the calibration set.
        after: bytes of the quantised checkpoint.
    """
    blocks = _blocks(tensors, experts_per_token(checkpoint))
    return {
        "peak_memory": _memory(checkpoint, blocks, size),
        "time": _time(checkpoint, blocks, size, after),
        "disk": _disk(checkpoint, blocks, size, after),
    }


def settle_offload(checkpoint: Checkpoint, tensors: Iterable[TensorPlan], size: CalibrationWork) -> CalibrationWork:
    """Decide where hidden states live, unless that is decided: on disk where the run would not fit beside them.

    Processes on this machine hold as much each, so each gets an equal part of its memory. What writing the calibration
    text takes does not count: it is free again when there are hidden states, and one process alone needs it.
    """
    if size.offload is not None or size.spec is None:
        return size
    moments = _moments(checkpoint, _blocks(tensors, experts_per_token(checkpoint)), size)
    peak = RUNTIME_BYTES + max(sum(parts.values()) for when, parts in moments if when != WRITING)
    return replace(size, offload=peak > MEMORY_SHARE * available_memory_bytes(processes=local_processes()))


def _blocks(tensors: Iterable[TensorPlan], per_token: int) -> list[list[Shared]]:
    by_block: dict[int, list[TensorPlan]] = {}
    for t in tensors:
        if t.block is not None and t.action == "quantize":
            by_block.setdefault(t.block, []).append(t)
    return [shared_inputs(ts, per_token) for ts in by_block.values()]


def experts_per_token(checkpoint: Checkpoint) -> int:
    """How many experts a mixture sends each token to, by its config; 1 where it does not say."""
    config = checkpoint.text_config
    return next((int(config[k]) for k in PER_TOKEN if isinstance(config.get(k), int)), 1)


def shared_inputs(linears: Sequence[TensorPlan], per_token: int = 1) -> list[Shared]:
    """A block's Linears by their input, as their names let expect it; the run itself looks at the tensors."""
    numbers: dict[str, set[str]] = {}
    for t in linears:
        match = EXPERT_MODULE.match(t.name.removesuffix(".weight"))
        if match is not None:
            numbers.setdefault(match["layer"], set()).add(match["number"])
    groups: dict[tuple[str, int], list[TensorPlan]] = {}
    for t in linears:
        parent, _, leaf = t.name.removesuffix(".weight").rpartition(".")
        kin = next((i for i, members in enumerate(FUSED) if leaf in members), None)
        key = (t.name, -1) if kin is None else (parent, kin)
        groups.setdefault(key, []).append(t)
    found = []
    for ts in groups.values():
        match = EXPERT_MODULE.match(ts[0].name.removesuffix(".weight"))
        shapes = tuple(tuple(t.shape) for t in ts)
        scales = max(t.shape[0] * (t.shape[1] // (t.group_size or t.shape[1])) for t in ts)
        share = 1.0 if match is None else min(1.0, per_token / len(numbers[match["layer"]]))
        found.append(Shared(shapes, scales, share, match is not None))
    return found


def _memory(checkpoint: Checkpoint, blocks: list[list[Shared]], size: CalibrationWork) -> Estimate:
    when, parts = max(_moments(checkpoint, blocks, size), key=lambda m: sum(m[1].values()))
    parts = {"runtime (torch, transformers, numba)": RUNTIME_BYTES} | parts
    return Estimate(value=sum(parts.values()), unit="bytes", how=f"what is held while {when}", parts=parts)


def _moments(
    checkpoint: Checkpoint, blocks: list[list[Shared]], size: CalibrationWork
) -> list[tuple[str, dict[str, float]]]:
    """All moments of a run at which memory may be fullest: when it is, and what is held besides the runtime."""
    moments = [m for block in blocks for m in _block_moments(checkpoint, block, size)]
    if size.spec is not None and writes_itself(size.spec):
        parts = {
            "the whole model, float32, its key-value cache and logits": float(
                self_writing_bytes(checkpoint.size_bytes, checkpoint.text_config, size.samples, size.seq_len)
            )
        }
        moments.append((WRITING, parts))
    if size.units:
        moments += _measuring_moments(checkpoint, blocks, size)
    if size.end_to_end:
        moments.append(("all scales are tuned together", _predicting_parts(checkpoint, size, size.end_to_end)))
    if size.spec is not None and may_have_pictures(size.spec):
        tower = sum(t.numel for n, t in checkpoint.tensors.items() if NOT_LANGUAGE.search(n))
        if tower:
            parts = {f"vision tower and projector, {size.compute}": float(size.dtype.itemsize * tower)}
            parts["hidden states"] = 0.0 if size.offload else size.dtype.itemsize * size.tokens * _hidden(checkpoint)
            moments.append(("pictures are looked at", parts))
    if size.spec is not None:
        vocabulary = int(checkpoint.text_config.get("vocab_size") or 0)
        moments.append(("the tokenizer is loaded", {"tokenizer, 2 kB a token": TOKENIZER_BYTES * vocabulary}))
    return moments


def _hidden(checkpoint: Checkpoint) -> int:
    return int(checkpoint.text_config.get("hidden_size") or 0)


def _block_moments(
    checkpoint: Checkpoint, block: list[Shared], size: CalibrationWork
) -> list[tuple[str, dict[str, float]]]:
    """The moments of one block at which memory may be fullest: when it is, and what is held."""
    if not size.tokens:
        largest = max(s.largest for s in block)
        return [("the largest Linear is rounded", {"rounding the largest Linear": 13.0 * largest})]
    hidden = int(checkpoint.text_config.get("hidden_size", block[0].width))
    item = float(size.dtype.itemsize)
    experts = [s for s in block if s.expert]
    block = [s for s in block if not s.expert]
    weights = sum(s.weights for s in block)
    of_experts = sum(s.weights for s in experts)
    resident = of_experts if item * of_experts <= RESIDENT_EXPERTS else 0
    group = min(group_size(max((s.width for s in experts), default=1)), len(experts) // 2)
    fetched = 0 if resident else group * sum(s.weights for s in experts[:2])
    upcast = 0.0 if size.dtype == torch.float32 else 4.0
    label = "hidden states of both models" if size.tuning else "hidden states"
    label += " (on disk: --offload)" if size.offload else ""
    always = {
        f"one block's weights, {size.compute}": item * (weights + resident),
        label: 0.0 if size.offload else item * (size.tokens + size.taught_tokens) * hidden,
    }
    moving = size.tuning is not None and size.tuning.code_rate > 0
    if moving:
        always[f"the weights before rounding, {size.compute}, to tune codes by"] = item * weights
    batch = size.batch_tokens
    heads = int(checkpoint.text_config.get("num_attention_heads") or 1)
    # What attention by products keeps for the way back: half of all scores' probabilities, in float32 and in bfloat16.
    scores = 3.0 * heads * batch * size.seq_len if size.dtype == torch.bfloat16 else 0.0
    # Without a way back: of one strip of queries, scores and probabilities in float32, and these in bfloat16.
    strip = 10.0 * heads * batch * min(QUERIES, size.seq_len) if size.dtype == torch.bfloat16 else 0.0
    moments: list[tuple[str, dict[str, float]]] = []
    if size.tuning:
        outputs = sum(s.share * shape[0] for s in (*block, *experts) for shape in s.shapes)
        tuning = {
            "codes, one Linear's gradient and its weight anew": weights
            + (10.0 + item + 2 * upcast) * max((s.largest for s in block), default=0),
            "one batch's graph": item * batch * (3 * outputs + 12 * hidden) + scores,
        }
        if moving:
            tuning["latents of all codes, float32, and gradients"] = (4.0 + item) * weights
        moments.append(("a block is tuned", always | tuning))
    for s in block:
        widest_output = max(shape[0] for shape in s.shapes)
        kept = 0.0 if _kept_on_disk([block], size, hidden) else _kept_bytes(s, size, hidden)
        rest = always | {
            "inputs and outputs kept between stages": kept,
            "codes found so far": float(weights - s.weights),
        }
        square = float(s.width**2)
        factoring = 10.0 * square
        candidates = 28.0 * min(CANDIDATES_PER_CALL, s.scales * len(SHRINK_FEW_BITS))
        observed = {
            f"second moment of width {s.width}, float32": 4.0 * square,
            "activations of one batch": batch * (item * (2 * widest_output + s.width + 4 * hidden) + upcast * s.width)
            + strip,
        }
        held = {
            f"Hessian of width {s.width} and its factor": 8.0 * square,
            "solving the largest Linear": (6.0 + upcast) * s.largest
            + 12.0 * min(STRIP * s.width, s.largest)
            + candidates,
        }
        moments += [
            ("a block's inputs are observed", rest | observed),
            (f"a Hessian of width {s.width} is factored", rest | {"factoring it": factoring}),
            ("a Linear is solved", rest | held),
        ]
    if experts:
        width = max(s.width for s in experts)
        tokens = 0.0 if size.offload else float(size.tokens)
        fit = max(1, BATCH_BYTES // (8 * width**2 + 14 * max(s.weights for s in experts)))
        at_once = min(group, fit, worthwhile(torch.device("cpu"), torch.get_num_threads()))
        rest = always | {
            "what enters the experts, and what leaves them": 2 * item * tokens * hidden,
            f"second moments of {group} experts and of all": 4.0 * (group + 2) * width**2,
        }
        if fetched:
            rest |= {f"weights of {group} experts": item * fetched}
        solving = at_once * (8.0 * width**2 + 14.0 * max(s.weights for s in experts))
        activations = item * batch * (3 * max(s.shapes[0][0] for s in experts) + 4 * hidden)
        moments += [
            ("experts' inputs are observed", rest | {"activations of one batch": activations}),
            ("experts are solved", rest | {f"solving {at_once} experts": solving}),
        ]
    return moments


def largest_experts(tensors: Iterable[TensorPlan]) -> int:
    """Weights of all experts of the block that has most."""
    totals: dict[int, int] = {}
    for t in tensors:
        if t.block is not None and ".experts." in t.name:
            totals[t.block] = totals.get(t.block, 0) + math.prod(t.shape)
    return max(totals.values(), default=0)


def group_size(width: int) -> int:
    """How many experts' second moments exist at a time."""
    return max(1, min(MOST_IN_GROUP, GROUP_BYTES // (4 * width * width)))


def _measuring_moments(
    checkpoint: Checkpoint, blocks: list[list[Shared]], size: CalibrationWork
) -> list[tuple[str, dict[str, float]]]:
    """The moments while sensitivities are measured: a block is passed, and predictions are compared."""
    hidden, vocabulary = (int(checkpoint.text_config.get(key) or 0) for key in ("hidden_size", "vocab_size"))
    label = "a hidden state for each unit" + (" (on disk: --offload)" if size.offload else "")
    states = {label: 0.0 if size.offload else _unit_states_bytes(size, hidden)}
    largest = max(blocks, key=lambda block: sum(s.weights for s in block))
    passing = {
        "one block's weights, float32": 4.0 * sum(s.weights for s in largest),
        "rounding one unit, and the scale search": 13.0 * max(s.weights for s in largest)
        + 28.0 * min(CANDIDATES_PER_CALL, max(s.scales for s in largest) * len(SHRINK_FEW_BITS)),
        "activations": 4.0 * size.measured_tokens * max(2 * shape[0] + shape[1] for s in largest for shape in s.shapes),
    }
    logits = min(LOGITS_BYTES, 4 * min(MEASURED_POSITIONS, size.measured_tokens) * vocabulary)
    comparing = {"output head, float32": 4.0 * hidden * vocabulary, "logits of both models": 4.0 * logits}
    return [
        ("sensitivities are measured", states | passing),
        ("predictions are compared to measure sensitivities", states | comparing),
    ]


def _predicting_parts(checkpoint: Checkpoint, size: CalibrationWork, options: EndToEndOptions) -> dict[str, float]:
    """What is held while the predictions of both models are compared to tune all scales by them."""
    hidden, vocabulary = (int(checkpoint.text_config.get(key) or 0) for key in ("hidden_size", "vocab_size"))
    item = size.dtype.itemsize
    return {
        f"output head, {size.compute}": float(item * hidden * vocabulary),
        "logits of both models and what is made of them": (5.0 + item / 2) * options.chunk_bytes,
        "hidden states": 0.0 if size.offload else item * size.taught_tokens * hidden,
        "one step's gradients": float(item * options.batches_per_step * size.batch_tokens * hidden),
    }


def _unit_states_bytes(size: CalibrationWork, hidden: int) -> float:
    return 4.0 * (size.units + 1) * size.measured_tokens * hidden


def _kept_bytes(shared: Shared, size: CalibrationWork, hidden: int) -> float:
    """What waits while a stage is solved: its input, unless it lies behind a norm as q/k/v's and gate/up's do (several
    Linears, here), and the attention's output."""
    return float(size.dtype.itemsize) * size.tokens * (hidden + (shared.width if len(shared.shapes) == 1 else 0))


def _kept_on_disk(blocks: list[list[Shared]], size: CalibrationWork, hidden: int) -> float:
    """As much of it as goes to files: all, where any block's would be too much for memory."""
    most = max((_kept_bytes(s, size, hidden) for block in blocks for s in block), default=0.0)
    return most if size.offload or most > KEPT_IN_MEMORY else 0.0


def _time(checkpoint: Checkpoint, blocks: list[list[Shared]], size: CalibrationWork, after: int) -> Estimate:
    rate = matmul_rate(size.dtype)
    everything = sum(s.weights for block in blocks for s in block)
    weights = sum(s.share * s.weights for block in blocks for s in block)
    squares = sum(s.share * s.width**2 for block in blocks for s in block)
    parts = {
        "a pass through the blocks": 2.0 * size.tokens * weights / rate,
        "second moments": 1.3 * size.tokens * squares / rate,
        "scales and columns": everything * (9e-8 if size.tokens else 5e-9),
        "reading and writing": (checkpoint.size_bytes + after) / DISK_BYTES_PER_S,
    }
    if size.tuning:
        taught = size.tuning.steps * size.tuning.samples_per_step * size.batch_tokens
        passes = size.tokens + size.taught_tokens * (1 + 2 / size.tuning.held_out)
        parts["tuning"] = (6.0 * taught + 2.0 * passes) * weights / rate
    if size.end_to_end:
        # Forward, forward again and back through blocks; both heads and one of them back; what is held out, forward.
        options, head = size.end_to_end, _hidden(checkpoint) * int(checkpoint.text_config.get("vocab_size") or 0)
        taught = options.steps * options.batches_per_step * size.batch_tokens
        judged = 2 * size.taught_tokens / options.held_out
        flops = (8.0 * taught + 2.0 * judged) * weights + (6.0 * taught + 4.0 * judged) * head
        parts["tuning all scales together"] = flops / rate + 2 * options.steps * after / DISK_BYTES_PER_S
    if size.units:
        head = int(checkpoint.text_config.get("hidden_size") or 0) * int(checkpoint.text_config.get("vocab_size") or 0)
        passes = size.units / 2 + 1
        positions = min(MEASURED_POSITIONS, size.measured_tokens)
        flops = 2.0 * (size.measured_tokens * passes * weights + positions * (size.units + 1) * head)
        parts["measuring sensitivities"] = flops / rate + 9e-8 * everything
    if size.spec is not None and writes_itself(size.spec):
        parameters = sum(t.size_bytes // DTYPES[t.dtype].itemsize for t in checkpoint.tensors.values())
        parts["writing the calibration text"] = (
            2.0 * size.samples * size.seq_len * parameters / (SAMPLING_SHARE * matmul_rate(torch.float32))
        )
    how = f"arithmetic at this machine's {size.compute} matmul rate, measured now: {rate / 1e9:.0f} GFLOP/s"
    return Estimate(value=sum(parts.values()), unit="seconds", how=how, parts=parts)


def _disk(checkpoint: Checkpoint, blocks: list[list[Shared]], size: CalibrationWork, after: int) -> Estimate:
    parts = {"quantised checkpoint": float(after)}
    if size.tokens:
        hidden = int(checkpoint.text_config.get("hidden_size", 0))
        parts["hidden states, kept for --resume until the end"] = (
            2.0 * size.dtype.itemsize * (size.tokens + size.taught_tokens) * hidden
        )
        if size.end_to_end:
            own = size.end_to_end.batches_per_step * size.batch_tokens * (len(blocks) + 1)
            scales = sum(s.scales * len(s.shapes) for block in blocks for s in block)
            parts["what all scales are tuned together by"] = (
                size.dtype.itemsize * hidden * (size.taught_tokens + own) + 28.0 * scales
            )
        kept = _kept_on_disk(blocks, size, hidden)
        parts |= {"inputs and outputs kept between stages": kept} if kept else {}
    if size.units and size.offload:
        states = 2 * _unit_states_bytes(size, int(checkpoint.text_config.get("hidden_size", 0)))
        parts["hidden states while sensitivities are measured"] = states
    how = "written beside each other in the output folder"
    return Estimate(value=sum(parts.values()), unit="bytes", how=how, parts=parts)


def matmul_rate(dtype: torch.dtype = torch.float32) -> float:
    """Matrix products a second on this CPU, in FLOP/s: the best of three of 1024 x 1024 x 1024."""
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
