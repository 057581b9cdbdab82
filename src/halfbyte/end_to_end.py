"""All scales tuned together against what the original model predicts, once every block is written.

Block tuning (``methods.tuning``) makes a block's output like the original's, and can only guess what matters further
on. What matters are predictions: with ``p_t`` the original's distribution of the next token at t and ``q_t(s)`` that of
the quantised model with scales s, this moves all scales to make

    D(s) = mean_t KL(p_t || q_t(s))

small. Codes, norms and embeddings stay. As in EfficientQAT's second phase (Chen et al., arXiv 2407.11062) only scales
learn; we differ in the loss (the original's predictions, not the text's next tokens) and in the memory: there is one
block in it, here too. A step goes forward block by block and keeps what entered each on disk; the head gives
``dD/dz = q - p`` for the logits z; then blocks come back in reverse order, each is run again, and its gradient ends in
its scales before it makes room for the one below. Adam's moments wait on disk between steps.

Scales move as ratios of where block tuning left them, and have the values that the file will hold in every step. The
outcome is kept only where D is smaller on samples that were not tuned on.

Every step leaves its scales in files of its own before the journal names it, so that a killed run goes on with the
step it was in, to the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.architectures import EXPERT_MODULE
from halfbyte.arithmetic import bfloat16_products
from halfbyte.blocks import Arguments, StreamedModel, run_block
from halfbyte.checkpoint.layout import write_error
from halfbyte.distributions import kl_rows
from halfbyte.heap import release_freed_memory
from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.tuned_parts import LinearState, TunedLinear, differentiated
from halfbyte.methods.tuning import BETAS, EndToEndOptions, schedule, split_numbers
from halfbyte.progress import Reporter
from halfbyte.ranks import Ranks
from halfbyte.records import EndToEndRecord, fsync_folder
from halfbyte.state import HiddenStates, RunFolder

EPSILON = 1e-12


@dataclass(slots=True)
class Lessons:
    """This rank's part of the calibration batches that are learnt from.

    Attributes:
        count: batches of all ranks; the b-th is rank ``b % world``'s, as its ``b // world``-th.
        shapes: ``(batch, tokens)`` of this rank's; rows: which flattened positions are tokens, ``None`` when all are.
        arguments: for each, what every block is called with.
        entering: what enters the first block; leaving: what leaves the original model's last one.
    """

    count: int
    shapes: Sequence[tuple[int, int]]
    rows: Sequence[torch.Tensor | None]
    arguments: Sequence[Sequence[Arguments]]
    entering: HiddenStates
    leaving: HiddenStates


@dataclass(slots=True)
class EndToEnd:
    """The scales of a written checkpoint on their way.

    Attributes:
        model: the quantised model, streamed from its files, which are not changed.
        lessons: what is learnt from.
        options: how long and how fast.
        run: whose journal says how far it is, under ``end_to_end``.
        ranks: the processes that share the batches.
    """

    model: StreamedModel
    lessons: Lessons
    options: EndToEndOptions
    run: RunFolder
    reporter: Reporter
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def folder(self) -> Path:
        return self.run.state_of(self.ranks.rank)

    def tune(self) -> EndToEndRecord:
        """All steps that the journal does not list; which scales to write is then :meth:`scales`."""
        taught, judges = split_numbers(self.lessons.count, self.options.held_out)
        order = schedule(taught, self.options.steps * self.options.batches_per_step, self.options.seed)
        known: dict[str, Any] = dict(self.run.journal.get("end_to_end", {}))
        if "before" not in known:
            self.reporter.say("tuning all scales together, against the original model's predictions")
            known = {"step": 0, "before": self._divergence(judges, 0)}
            self._record(known)
        self.reporter.start("tuning all scales: steps", self.options.steps)
        self.reporter.advance(int(known["step"]))
        size = self.options.batches_per_step
        for step in range(int(known["step"]), self.options.steps):
            self._step(order[step * size : (step + 1) * size], step)
            known = known | {"step": step + 1}
            self._record(known)
            for index in range(self.model.num_blocks):
                self._file(index, step).unlink(missing_ok=True)
            self.reporter.advance()
        self.reporter.finish()
        if "after" not in known:
            known = known | {"after": self._divergence(judges, self.options.steps)}
            self._record(known)
        before, after = float(known["before"]), float(known["after"])
        self.reporter.say(f"divergence on samples that were not tuned on: {before:.5f} nats, now {after:.5f}")
        return EndToEndRecord(steps=self.options.steps, kl_before=before, kl_after=after, kept=after < before)

    def scales(self, index: int) -> dict[str, torch.Tensor]:
        """A block's scales after the last step, by the names and in the dtype of the file."""
        with self.model.block(index) as block:
            states = self._states(block, index, self.options.steps)
            return {f"{n}.weight_scale": s.result().scales.cpu() for n, (s, *_) in states.items()}

    def _record(self, known: Mapping[str, Any]) -> None:
        self.ranks.agree()  # every rank's files are complete
        self.run.record(int(self.run.journal["stage"]), end_to_end=dict(known))
        self.ranks.agree()

    def _own(self, numbers: Sequence[int]) -> list[int]:
        """This rank's of some batches, as it numbers them."""
        return [b // self.ranks.world for b in numbers if b % self.ranks.world == self.ranks.rank]

    def _file(self, index: int, step: int) -> Path:
        return self.folder / f"scales-{index:04d}-{step:04d}.safetensors"

    def _states(
        self, block: nn.Module, index: int, step: int
    ) -> dict[str, tuple[LinearState, torch.Tensor, torch.Tensor]]:
        """A block's Linears as they are after so many steps, placed in it, with Adam's two moments."""
        file = self._file(index, step)
        kept = load_file(file) if step else {}
        found = {}
        for name, module in self.model.linears(index).items():
            coded = None if EXPERT_MODULE.match(name) else self.model.weights.coded(name)
            if coded is None:
                continue
            fmt, codes, scales, zeros = coded
            scales = kept.get(f"{name}.start", scales)  # the file may hold tuned ones already
            given = QuantizedWeight(codes=codes, scales=scales, zero_points=zeros, relative_error=0.0)
            spec = TunedLinear(module=module, quantized=given, fmt=fmt, scale_dtype=scales.dtype)
            state = LinearState.of(spec, tune_codes=False)
            moments = [torch.zeros_like(state.ratio), torch.zeros_like(state.ratio)]
            if kept:
                state.ratio.copy_(kept[f"{name}.ratio"])
                for moment, leaf in zip(moments, ("mean", "square"), strict=True):
                    moment.copy_(kept[f"{name}.{leaf}"])
                state.place()
            found[name] = (state, moments[0], moments[1])
        return found

    def _forward(self, own: Sequence[int], step: int) -> HiddenStates:
        """What enters every block, and what leaves the last, for some of this rank's batches; on disk."""
        shapes = [self.lessons.shapes[b] for b in own]
        states = HiddenStates(self.folder, shapes, self.lessons.entering.width, self.model.dtype, True, "step")
        for slot, b in enumerate(own):
            states.write(slot, self.lessons.entering.read(b), stage=0)
        for index in range(self.model.num_blocks):
            states.turn(index)
            with self.model.block(index) as block:
                self._states(block, index, step)
                for slot, b in enumerate(own):
                    hidden = states.read(slot).to(self.model.device)
                    states.write(slot, run_block(block, hidden, self.lessons.arguments[b][index]), stage=index + 1)
        states.turn(self.model.num_blocks)
        release_freed_memory()  # the head takes much, and blocks do not need it
        return states

    def _forget(self, states: HiddenStates) -> None:
        for stage in range(self.model.num_blocks + 1):
            states.forget(stage)

    def _divergence(self, numbers: Sequence[int], step: int) -> float:
        """D on some batches, of all ranks."""
        own = self._own(numbers)
        states = self._forward(own, step)
        sums = torch.zeros(2, dtype=torch.float64)
        with self.model.head():
            for slot, b in enumerate(own):
                for p, _, z in self._chunks(states, slot, b, gradient=False):
                    sums += torch.tensor([float(kl_rows(p, z).sum()), float(len(z))], dtype=torch.float64)
        self._forget(states)
        self.ranks.add_(sums)
        return float(sums[0] / sums[1])

    def _chunks(self, states: HiddenStates, slot: int, b: int, *, gradient: bool) -> Any:
        """The original's logits ``[n, vocabulary]`` float32, the quantised model's last hidden states ``[n, hidden]``
        and its logits, a few of a batch's tokens at a time. Needs the model's head."""
        device, dtype = self.model.device, self.model.dtype
        target, hidden = (s.flatten(0, 1) for s in (self.lessons.leaving.read(b), states.read(slot)))
        real = self.lessons.rows[b]
        positions = torch.arange(len(hidden)) if real is None else torch.nonzero(real)[:, 0]
        vocabulary = int(self.model.weights.checkpoint.text_config["vocab_size"])
        for chunk in torch.split(positions, max(1, self.options.chunk_bytes // (4 * vocabulary))):
            p = self.model.logits(target[chunk][None].to(device, dtype))[0]
            own = hidden[chunk].to(device, dtype).requires_grad_(gradient)
            yield p, (chunk, own), self.model.logits(own[None], gradient=gradient)[0]

    def _gradients(self, states: HiddenStates, own: Sequence[int]) -> list[torch.Tensor]:
        """``n dD/dh`` of what leaves the last block ``[batch, tokens, hidden]``, for each of some batches."""
        found = []
        with self.model.head():
            for slot, b in enumerate(own):
                total = torch.zeros(states.read(slot).shape, dtype=self.model.dtype)
                for p, (chunk, hidden), z in self._chunks(states, slot, b, gradient=True):
                    with torch.no_grad():
                        towards = torch.softmax(z, dim=-1).sub_(torch.softmax(p, dim=-1))
                    (gradient,) = torch.autograd.grad(z, hidden, towards)
                    total.flatten(0, 1)[chunk] = gradient.to(total)
                found.append(total)
        release_freed_memory()
        return found

    def _step(self, numbers: Sequence[int], step: int) -> None:
        """One update of all scales, from some batches of all ranks."""
        own = self._own(numbers)
        exact = bfloat16_products() if self.model.dtype == torch.bfloat16 else contextlib.nullcontext()
        states = self._forward(own, step)
        with exact:
            gradients = self._gradients(states, own)
            for index in reversed(range(self.model.num_blocks)):
                states.turn(index)
                with self.model.block(index) as block:
                    parts = self._states(block, index, step)
                    with differentiated([s for s, *_ in parts.values()]), torch.enable_grad():
                        for slot, b in enumerate(own):
                            hidden = states.read(slot).to(self.model.device).requires_grad_()
                            output = self.lessons.arguments[b][index].run(block, hidden)
                            output.backward(gradients[slot].to(output))  # type: ignore[no-untyped-call]
                            assert hidden.grad is not None
                            gradients[slot] = hidden.grad.cpu()
                    self._update(parts, index, step)
        self._forget(states)

    def _update(
        self, parts: Mapping[str, tuple[LinearState, torch.Tensor, torch.Tensor]], index: int, step: int
    ) -> None:
        """Adam, with a rate that falls linearly to 0; the outcome goes to the next step's file."""
        rate = self.options.scale_rate * (1.0 - step / self.options.steps)
        kept: dict[str, torch.Tensor] = {}
        for name, (state, mean, square) in parts.items():
            gradient = state.ratio.grad if state.ratio.grad is not None else torch.zeros_like(state.ratio)
            self.ranks.add_(gradient)
            mean.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            unbiased = [m / (1 - beta ** (step + 1)) for m, beta in zip((mean, square), BETAS, strict=True)]
            moved = state.ratio.detach() - rate * unbiased[0] / (unbiased[1].sqrt() + EPSILON)
            kept |= {
                f"{name}.start": state.spec.quantized.scales,
                f"{name}.ratio": moved.cpu(),
                f"{name}.mean": mean.cpu(),
                f"{name}.square": square.cpu(),
            }
        path = self._file(index, step + 1)
        try:
            save_file(kept, path)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            fsync_folder(path.parent)
        except OSError as e:
            raise write_error(e, path, 0) from None
