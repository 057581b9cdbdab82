"""The loop: load a block, learn about its inputs, choose codes, move the hidden states on, write, free.

Memory holds one block, its statistics and (unless offloaded) the calibration set's hidden states; nothing grows with
the number of blocks. Every finished block is on disk before the next is touched, see ``state``.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from halfbyte.activations import fake_quantize_activations
from halfbyte.architectures import EXPERT_MODULE
from halfbyte.arithmetic import ComputeDtype, bfloat16_products
from halfbyte.blocks import (
    Arguments,
    Interner,
    StreamedModel,
    all_finite,
    not_finite,
    require_finite,
    require_finite_weights,
    run_block,
)
from halfbyte.calibration import (
    Batch,
    Calibration,
    calibrate,
    tokens_per_batch,
)
from halfbyte.checkpoint.layout import Layout
from halfbyte.checkpoint.reader import (
    DTYPES,
    Checkpoint,
    combined_digest,
    companion_files,
    digest_of,
    open_checkpoint,
)
from halfbyte.checkpoint.source import resolve
from halfbyte.end_to_end import EndToEnd, Lessons
from halfbyte.errors import (
    ArchitectureError,
    HalfbyteError,
    MemoryShortage,
    NumericsError,
    OutputError,
    RankError,
    ResumeError,
    UsageError,
    counted,
    raise_all,
)
from halfbyte.estimates import KEPT_IN_MEMORY, CalibrationWork
from halfbyte.gpu import full_float32, wait_for_copies, works_ahead
from halfbyte.heap import is_out_of_memory, mapped, release_freed_memory, reuse_freed_memory
from halfbyte.kernels.dispatch import gpu_problem
from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.rtn import quantize_rtn
from halfbyte.methods.tuned_parts import TunedLinear, TunedVector
from halfbyte.methods.tuning import EndToEndOptions, Sample, TuningOptions, norm_gain, samples_chosen, tune_block
from halfbyte.mixing import Budget, groups_of
from halfbyte.output import finish_checkpoint, write_config
from halfbyte.packing import pack
from halfbyte.pairs import Pair, find_pairs
from halfbyte.planner import (
    GroupSize,
    WorkPlan,
    calibration_work,
    choose_recipe,
    make_plan,
    require_calibration,
)
from halfbyte.progress import Reporter, Silent
from halfbyte.ranks import Ranks
from halfbyte.recipe import WIDER, Effort, Recipe, wider
from halfbyte.records import (
    CalibrationRecord,
    EndToEndRecord,
    LinearRecord,
    Manifest,
    PairRecord,
    Plan,
    Sensitivity,
    SmoothingRecord,
    TuningRecord,
    from_plain,
    read_record,
)
from halfbyte.schemes import ActivationFormat
from halfbyte.sensitivity import deal_out
from halfbyte.sequential import AtOnce, Leaf, Norms, Route, Sequential, Shelf, Walk, find_norms, learn_route
from halfbyte.smoother import Smoother, Solved
from halfbyte.solver import Solver
from halfbyte.state import HiddenStates, RunFolder, already_published
from halfbyte.statistics import SecondMoment
from halfbyte.tokens import load_calibration, save_calibration
from halfbyte.weights import Weights


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    scheme: str = "W4A16",
    group_size: GroupSize = None,
    method: Literal["gptq", "rtn"] | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    ignore: Sequence[str] = (),
    recipe: Path | None = None,
    effort: Effort | None = None,
    target_bits: float | None = None,
    all_experts: bool | None = None,
    device: str = "auto",
    dtype: ComputeDtype = "auto",
    offload: bool | None = None,
    resume: bool = False,
    seed: int | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
) -> Manifest:
    """Write a few-bit copy of a checkpoint.

    Args:
        source: a checkpoint folder (safetensors) or a hub id.
        out: folder to create; nothing is left under this name unless the run succeeds.
        scheme: a preset of ``schemes.PRESETS``; group_size: 128, 64, 32, ``"channel"`` or ``None`` for the preset's.
        method: ``"gptq"`` or ``"rtn"``; ``None`` is GPTQ for integer schemes, RTN for FP8.
        calibration: ``self``, ``text:FILE``, ``jsonl:FILE``, ``hf:DATASET[:CONFIG][:SPLIT]``, ``vlm:FOLDER_OR_JSONL``
            or ``random-tokens``, or a mixture such as ``text:FILE*0.5+vlm:FOLDER*0.5``;
            ``None`` is ``self`` where the model fits in memory.
        samples, seq_len: sequences and tokens in each (128 x 512).
        ignore: Linears to leave alone, exact names or ``re:`` patterns.
        recipe: a recipe file instead of scheme, group size, method and ignore.
        effort: how long each block is tuned on its output after GPTQ: ``low`` is not at all, ``standard`` a little,
            ``high`` longer; ``None`` is the recipe's.
        all_experts: let every expert of a mixture see all calibration tokens, not only those routed to it; ``None`` is
            the recipe's.
        target_bits: stored bits a quantised weight, at most, on average: Linears that suffer most from the scheme get
            W8A16, see ``sensitivity``; ``None`` is the recipe's, which is none unless it says so.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: what blocks compute in: ``float32``, ``bfloat16``, or ``auto``, see ``arithmetic.compute_dtype``.
        offload: keep hidden states on disk only; ``None``: where they would not fit in memory.
        resume: continue the unfinished run in ``out``.partial.
        seed: for calibration text that is drawn at random.
        reporter: hears progress.
        ranks: the processes that work on it together, all of which call this, see ``ranks.joined``; ``None``: this one.

    Returns:
        the manifest, which is also written to ``out/halfbyte.json``.

    Raises:
        HalfbyteError: with what, where, why and a remedy, see ``errors``.
    """
    reuse_freed_memory()
    reporter, ranks = reporter or Silent(), ranks or Ranks()
    out = Path(out)
    chosen = choose_recipe(
        scheme=scheme,
        group_size=group_size,
        method=method,
        ignore=ignore,
        recipe=recipe,
        effort=effort,
        target_bits=target_bits,
        all_experts=all_experts,
    )
    require_calibration(chosen, calibration)
    target = choose_device(device)
    if resume and ranks.decide(lambda: already_published(out)):
        return read_record(Manifest, out / "halfbyte.json")
    checkpoint = open_checkpoint(resolve(source), str(source))
    # The default depends on free memory, which a resumed run must not.
    spec = calibration or chosen.calibration or (RunFolder.options_of(out).get("calibration") if resume else None)
    size = ranks.decide(
        lambda: calibration_work(
            chosen, checkpoint, spec, samples, seq_len, offload=offload, device=target.type, dtype=dtype
        )
    )
    work = make_plan(checkpoint, chosen, size)
    raise_all(work.problems)
    work = replace(work, calibration=ranks.decide(lambda: work.calibration))
    require_work_for_all(work.calibration, ranks, tokens_per_batch(target.type, tuned=size.tuning is not None))
    if work.calibration.offload and offload is None:
        reporter.say("note: hidden states stay on disk, because they would not fit in memory beside the rest")
    for note in (*work.plan.notes, *chosen.notes):
        reporter.say(f"note: {note}")
    options = {
        "source": checkpoint.fingerprint(),
        **chosen.to_plain(),
        "calibration": size.spec,
        "samples": size.samples,
        "seq_len": size.seq_len,
        "seed": seed if seed is not None else (chosen.seed or 0),
        "device": target.type,
        "dtype": size.compute,
        "threads": torch.get_num_threads(),
        "versions": versions(target),
    } | ({"ranks": ranks.world} if ranks.world > 1 else {})
    run = open_run(out, options, ranks, resume=resume)
    try:
        with ranks.sharing(), full_float32(target):
            job = Job(work.checkpoint, work, chosen, target, options, run, reporter, ranks)
            manifest = job.carry_out()
    except OutputError as e:
        if run.fresh:
            run.discard()
            raise
        run.leave()
        kept = f"With --resume it continues after {finished_blocks(run)}."
        raise OutputError(e.what, where=e.where, why=e.why, remedy=f"{e.remedy} {kept}") from None
    except (ResumeError, RankError):
        run.leave()
        raise
    except HalfbyteError:
        run.discard()
        raise
    except BaseException as e:
        run.leave()
        if is_out_of_memory(e):
            raise memory_shortage(work.plan, run) from e
        raise
    run.publish()
    return manifest


def memory_shortage(planned: Plan, run: RunFolder) -> MemoryShortage:
    """What to say when memory was refused in the middle of a run."""
    peak = planned.estimates["peak_memory"]
    return MemoryShortage(
        f"no more memory was to be had after {finished_blocks(run)}",
        where=str(run.out),
        why=f"the plan expects a peak of {peak.value / 2**30:.2f} GiB, {peak.how}, and other programs or a limit "
        "may leave less",
        remedy="Free memory or raise the limit, then go on with --resume; or start again with --offload, fewer "
        "--samples, a shorter --seq-len or --effort low.",
    )


def finished_blocks(run: RunFolder) -> str:
    """How many there are, for messages."""
    return counted(max(0, int(run.journal["stage"])), "finished block")


# What stands for codes that are in the file already.
WRITTEN = QuantizedWeight(codes=torch.empty(0), scales=torch.empty(0), zero_points=None, relative_error=0.0)


@dataclass(slots=True)
class Job:
    """One quantisation: the stages, in order, each ended by an entry in the journal."""

    checkpoint: Checkpoint
    work: WorkPlan
    recipe: Recipe
    device: torch.device
    options: dict[str, Any]
    run: RunFolder
    reporter: Reporter
    ranks: Ranks = field(default_factory=Ranks)
    started: float = field(default_factory=time.monotonic)
    sensitivity: Sensitivity | None = None
    _layout: Layout = field(default_factory=lambda: Layout({}, {}))
    _digests: dict[str, str] = field(default_factory=dict)
    _saving: Future[None] | None = None
    _solver: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def carry_out(self) -> Manifest:
        """All stages that the journal does not list as finished."""
        blocks = self.work.blocks
        facts = self.run.journal
        if self.run.fresh and self.ranks.first:
            self._require_space()
        with contextlib.ExitStack() as stack:
            # Whoever fails meanwhile does not wait for what is still to be copied.
            copier, stop = ThreadPoolExecutor(1), threading.Event()
            stack.callback(copier.shutdown, cancel_futures=True)
            stack.callback(stop.set)
            copied = None if self.work.budget is not None else self._copy_outside(copier, stop)
            # Building the module tree also proves that every planned module is a Linear of this architecture.
            model = StreamedModel.of(Weights.of(self.checkpoint), self.device, self.work.calibration.dtype)
            self._require_linears(model)
            self._solver = self._choose_solver()
            if self.work.budget is not None:
                self._spend(self.work.budget, model)
            if copied is None:
                copied = self._copy_outside(copier, stop)
            calibration = self._calibration()
            digests = dict(copied) if self.run.fresh else dict(facts["digests"])
        layout = self._layout
        if not self.run.fresh:
            self.reporter.say(f"resuming: {facts['stage']} of {blocks.num_blocks} blocks are done")
        self._digests = digests
        records = [from_plain(LinearRecord, r) for r in facts.get("linears", [])]
        smoothing = [from_plain(SmoothingRecord, r) for r in facts.get("smoothing", [])]
        pairs = [from_plain(PairRecord, r) for r in facts.get("pairs", [])]
        tuning = [from_plain(TuningRecord, r) for r in facts.get("tuning", [])]
        timings = list(facts.get("blocks", []))
        stream = None
        if calibration is not None and self.work.calibration.observed:
            stream = Stream.begin(
                model,
                calibration,
                self.run,
                self.reporter,
                self.ranks,
                offload=bool(self.work.calibration.offload),
                tuning=self.work.calibration.tuning,
                end_to_end=self.work.calibration.end_to_end,
            )
        if self.run.fresh:
            keep = None if stream is None else stream.saver(0)
            self._save(layout, stream, 0, digests, keep=keep, linears=[], blocks=[])
        self.reporter.start("blocks", blocks.num_blocks)
        self.reporter.advance(max(int(facts["stage"]), 0))
        with ThreadPoolExecutor(1) as saver:
            for index in range(int(facts["stage"]), blocks.num_blocks):
                clock = time.monotonic()
                solved = self._solve_block(model, stream, index)
                write = partial(self._write_block, index, solved) if self.ranks.first else None
                if write is not None and not works_ahead(self.device):
                    write = write()
                records += [r for r, _ in solved.linears.values()]
                smoothing += solved.smoothing
                pairs += solved.pairs
                tuning += solved.tuning
                seconds = time.monotonic() - clock
                release_freed_memory()
                timings.append(
                    {
                        "block": index,
                        "seconds": round(seconds, 3),
                        "solver_seconds": round(solved.solver_seconds, 3),
                        "peak_bytes": peak_bytes(),
                    }
                )
                self._report(index, [r for r, _ in solved.linears.values()], timings)
                self._await_save()
                self.ranks.agree()  # whoever fails from here on, all are saving
                stage = {
                    "linears": [asdict(r) for r in records],
                    "smoothing": [asdict(r) for r in smoothing],
                    "pairs": [asdict(r) for r in pairs],
                    "tuning": [asdict(r) for r in tuning],
                    "blocks": list(timings),
                }
                if stream is not None:
                    stream.turn(index + 1)
                written = digests if write is not None else dict(digests)
                keep = None if stream is None else stream.saver(index + 1)
                self._saving = saver.submit(self._save, layout, stream, index + 1, written, write, keep, **stage)
            self._await_save()
        self.reporter.finish()
        together = None if stream is None else self._tune_together(stream)
        return self.ranks.decide(
            lambda: self._finish(calibration, records, smoothing, pairs, tuning, together, digests, timings)
        )

    def _copy_outside(self, copier: ThreadPoolExecutor, stop: threading.Event) -> Iterator[tuple[str, str]]:
        """Lay the files out and begin to copy what is not quantised, beside whatever comes next.

        Returns:
            names and digests, each once it is there; nothing where another rank copies, or a run is resumed.
        """
        layout = self._layout = Layout.of(self.work.outputs)
        if not (self.run.fresh and self.ranks.first):
            return iter(())
        layout.create(self.run.checkpoint)
        outside = self.work.blocks.outside
        digests = copier.map(partial(layout.copy, self.run.checkpoint, self.checkpoint, stop=stop), outside)

        def waited() -> Iterator[tuple[str, str]]:
            self.reporter.start("copying what is not quantised", len(outside))
            for copied in zip(outside, digests, strict=True):
                yield copied
                self.reporter.advance()

        return waited()

    def _tune_together(self, stream: Stream) -> EndToEndRecord | None:
        """Tune the scales of all blocks that are written, and write those that are better."""
        options = self.work.calibration.end_to_end
        if options is None or len(stream.taught) < 2:  # one is to judge by
            return None
        folder = self.run.checkpoint
        if self.ranks.first:
            write_config(folder, self.checkpoint, self.work, self.recipe)
        self.ranks.agree()
        stream.states.release()
        weights = Weights.of(open_checkpoint(folder, str(folder)))
        model = replace(StreamedModel.of(weights, self.device, stream.model.dtype), ahead=None)
        model.in_tuples = stream.model.in_tuples
        own, none = stream.own, HiddenStates(self.run.state, [], stream.states.width, model.dtype, offload=True)
        lessons = Lessons(
            count=len(stream.taught),
            shapes=[stream.states.shapes[i] for i in own],
            rows=[stream.rows[i] for i in own],
            arguments=[stream.arguments[i] for i in own],
            entering=stream.entering or none,
            leaving=stream.originals or none,
        )
        work = EndToEnd(model, lessons, options, self.run, self.reporter, self.ranks)
        record = work.tune()
        if record.kept and self.ranks.first:
            for index in range(model.num_blocks):
                self._layout.write(folder, work.scales(index))
            self._layout.sync(folder)
        self.ranks.agree()
        return record

    def _choose_solver(self) -> torch.device:
        """The GPU, where its kernels work; what keeps them from it is said."""
        if self.device.type == "cpu" or self.recipe.method == "rtn":
            return torch.device("cpu")
        problem = gpu_problem(self.device)
        if problem:
            self.reporter.say(f"note: weights are solved on the CPU, more slowly: {problem}")
        return torch.device("cpu") if problem else self.device

    def _finish(
        self,
        calibration: Calibration | None,
        records: list[LinearRecord],
        smoothing: list[SmoothingRecord],
        pairs: list[PairRecord],
        tuning: list[TuningRecord],
        together: EndToEndRecord | None,
        digests: dict[str, str],
        timings: list[dict[str, Any]],
    ) -> Manifest:
        """The files besides the weights."""
        return finish_checkpoint(
            folder=self.run.checkpoint,
            checkpoint=self.checkpoint,
            work=self.work,
            recipe=self.recipe,
            options=self.options,
            calibration=None if calibration is None else calibration.record,
            linears=records,
            smoothing=smoothing,
            pairs=pairs,
            tuning=tuning,
            sensitivity=self.sensitivity,
            end_to_end=together,
            source_sha256=combined_digest(digests),
            companions=list(companion_files(self.checkpoint.path)),
            run={
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self.started, 3),
                "peak_bytes": peak_bytes(),
                **self._foretold(),
                "offload": bool(self.work.calibration.offload),
                "device": self.device.type,
                "dtype": self.options["dtype"],
                "machine": platform.machine(),
                "blocks": timings,
            },
        )

    def _foretold(self) -> dict[str, Any]:
        """The peak that the plan expected, in bytes, to be held against the real one; it reckons with a CPU."""
        if self.device.type != "cpu":
            return {}
        return {"planned_peak_bytes": round(self.work.plan.estimates["peak_memory"].value)}

    def _require_space(self) -> None:
        """Stop before long work when the disk cannot hold the output and the hidden states."""
        needed = self.work.plan.estimates["disk"].value
        free = shutil.disk_usage(self.run.partial).free + held_in(self.run.checkpoint)
        if free < needed:
            raise OutputError(
                f"{needed / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free",
                where=str(self.run.partial.parent),
                remedy="Free space or choose another folder; `halfbyte plan` shows what the space is for.",
            )

    def _calibration(self) -> Calibration | None:
        """The calibration set: made once, kept with the run."""
        if self.options["calibration"] is None:
            return None
        kept = self.run.state / "calibration.safetensors"
        if self.ranks.first and not kept.exists():
            self._make_calibration(kept)
        self.ranks.agree()
        return load_calibration(kept, self.checkpoint.path)

    def _make_calibration(self, kept: Path) -> None:
        calibration = calibrate(
            self.options["calibration"],
            model_path=self.checkpoint.path,
            samples=self.work.calibration.samples,
            seq_len=self.work.calibration.seq_len,
            seed=self.options["seed"],
            device=self.device.type,
            reporter=self.reporter,
        )
        save_calibration(kept, calibration)
        self.reporter.say(describe(calibration.record))

    def _spend(self, budget: Budget, model: StreamedModel) -> None:
        """Settle which Linears get more bits. From here on recipe and plan say so, and there is nothing to choose."""
        calibration = self._calibration()
        assert calibration is not None
        found = self.ranks.decide(
            lambda: deal_out(
                model,
                budget,
                self.work.schemes,
                calibration,
                self.run.state,
                offload=bool(self.work.calibration.offload),
                search=self.recipe.method == "gptq" and self.recipe.gptq.scale_search,
                reporter=self.reporter,
            )
        )
        schemes = dict(self.work.schemes)
        for unit in found.units:
            if unit.scheme == WIDER:
                schemes |= {n: wider(schemes[n]) or schemes[n] for n in unit.linears}
        self.recipe = replace(self.recipe, groups=groups_of(self.work.blocks, schemes), target_bits=None)
        work = make_plan(self.checkpoint, self.recipe, self.work.calibration)
        raise_all(work.problems)
        assert work.schemes == schemes, "patterns that do not say what was chosen"
        self.work, self.sensitivity = work, found

    def _require_linears(self, model: StreamedModel) -> None:
        for index, names in enumerate(self.work.blocks.linears):
            known = model.linears(index)
            strangers = [n for n in names if n in self.work.schemes and n not in known]
            if strangers:
                raise ArchitectureError(
                    f"block {index} has {counted(len(strangers), 'weight')} in modules that are not Linears",
                    where=strangers[0],
                    why=f"as {type(model.model).__name__} in transformers has it",
                    remedy="Leave them out with --ignore.",
                )

    def _solve_block(self, model: StreamedModel, stream: Stream | None, index: int) -> Solved:
        """Quantise one block's Linears; with calibration, also move the hidden states past it."""
        names = [n for n in self.work.blocks.linears[index] if n in self.work.schemes]
        if stream is None:
            return Solved({n: self._put_away(n, *self._round(n, index)) for n in names})
        solved = Solved({})
        results = solved.linears
        last = index + 1 == model.num_blocks
        with model.block(index) as block:
            modules = {n: m for n, m in model.linears(index).items() if n in names}
            require_finite_weights(modules)
            if stream.tuning is not None:
                stream.aim(block, index)
            formats = self._activation_formats(names)
            smoother = self._smoother(model, block, modules, index)
            solver = Solver(self.work.schemes, self._dtypes(), self.recipe, self._solver, self.ranks)
            with stream.walk(block, index, modules, formats, self.recipe) as walk:
                for moments in walk.moments():
                    release_freed_memory()
                    for moment in moments:
                        if not bool(torch.isfinite(moment.hessian.diagonal()).all()):
                            raise stream.overflow(block, index, moment.names[0])
                    if self.recipe.gptq.smoothing and len(moments) == 1:
                        smoother.smooth(walk, moments[0], solved)
                    clock = time.monotonic()
                    with mapped():
                        if stream.tuning is not None and stream.tuning.code_rate > 0:
                            solved.weights |= self._to_be_rounded(moments, modules)
                        results |= solver.solve(moments, modules, index)
                    solved.solver_seconds += time.monotonic() - clock
                    if EXPERT_MODULE.match(moments[0].names[0]):
                        wait_for_copies(self.device)
                        results |= {n: self._put_away(n, *results[n]) for m in moments for n in m.names}
                    release_freed_memory()
                if not last and stream.tuning is None:
                    self._await_save()  # before hidden states take memory a second time
                    stream.advance(block, index, walk)
            wait_for_copies(self.device)
            if stream.tuning is not None:
                self._tune(block, index, modules, formats, stream, solved)
                if not last:
                    self._await_save()
                    stream.advance(block, index, stream.at_once(block, index, modules, formats, self.recipe))
        solved.linears = {n: results[n] for n in names}
        return solved

    @staticmethod
    def _to_be_rounded(moments: Sequence[SecondMoment], modules: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
        """Copies of Linears' weights ``[out, in]``, to tune their codes by; experts' codes are not tuned."""
        names = [n for m in moments for n in m.names if EXPERT_MODULE.match(n) is None]
        return {n: modules[n].weight.detach().clone() for n in names}

    def _smoother(
        self, model: StreamedModel, block: nn.Module, modules: Mapping[str, nn.Linear], index: int
    ) -> Smoother:
        on_disk = partial(model.disk_name, index)
        return Smoother(block, modules, on_disk, self.work.schemes, self._dtypes(), self.ranks)

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {n: DTYPES[t.dtype] for n, t in self.checkpoint.tensors.items() if t.dtype in DTYPES}

    def _tune(
        self,
        block: nn.Module,
        index: int,
        modules: Mapping[str, nn.Linear],
        formats: Mapping[str, ActivationFormat],
        stream: Stream,
        solved: Solved,
    ) -> None:
        """Tune the whole block on its output error against the original model's; the better of the two is kept. Experts
        stay as they were solved: a few of them see few of the tokens."""
        modules = {n: m for n, m in modules.items() if EXPERT_MODULE.match(n) is None}
        if not modules or stream.tuning is None:
            return
        tuned = {}
        for name, module in modules.items():
            fmt = formats.get(name)
            tuned[name] = TunedLinear(
                module=module,
                quantized=solved.linears[name][1],
                fmt=self.work.schemes[name].weights,
                scale_dtype=DTYPES[self.checkpoint.tensors[f"{name}.weight"].dtype],
                quantize_input=None if fmt is None else partial(fake_quantize_activations, fmt=fmt),
                weight=solved.weights.pop(name, None),
            )
        width = int(self.checkpoint.text_config["hidden_size"])
        norms = stream.norms_of(block, index, modules)
        gain = None
        if norms.reads is not None:
            with stream.model.norm_after(index, norms.reads) as norm, torch.no_grad():
                gain = None if norm is None else norm_gain(norm, width)
        vectors = self._vectors(block, index, norms, stream, solved) if stream.tuning.vector_rate > 0 else {}
        # For what autograd multiplies in float32 on the way back, such as attention's scores.
        with bfloat16_products() if stream.model.dtype == torch.bfloat16 else contextlib.nullcontext():
            result = tune_block(
                block, tuned, stream.samples_of(index), stream.tuning, vectors=vectors, gain=gain, ranks=self.ranks
            )
        for name, weight in result.weights.items():
            solved.linears[name] = (solved.linears[name][0], weight)
        solved.rewritten |= result.vectors
        if len(stream.taught) < 2:  # nothing to judge by, so nothing was tuned
            return
        solved.tuning.append(
            TuningRecord(
                block=index,
                loss_before=result.loss_before,
                loss_after=result.loss_after,
                kept=result.kept,
                norms=list(result.vectors),
            )
        )

    def _vectors(
        self, block: nn.Module, index: int, norms: Norms, stream: Stream, solved: Solved
    ) -> dict[str, TunedVector]:
        """The weights of a block's norms that are tuned, by their names on disk. Those of smoothed norms stay: what the
        columns behind one were multiplied by is read from what is written."""
        dtypes = self._dtypes()
        named = {stream.model.disk_name(index, f"{path}.weight"): block.get_submodule(path) for path in norms.paths}
        return {
            name: TunedVector(module=module, leaf="weight", dtype=dtypes[name])
            for name, module in named.items()
            if name in dtypes and name not in solved.rewritten
        }

    def _activation_formats(self, names: Sequence[str]) -> dict[str, ActivationFormat]:
        formats = {n: self.work.schemes[n].activations for n in names}
        return {n: f for n, f in formats.items() if f is not None}

    def _round(self, name: str, index: int) -> tuple[LinearRecord, QuantizedWeight]:
        """Round one weight to nearest."""
        scheme = self.work.schemes[name]
        stored = self.checkpoint.read(f"{name}.weight")
        weight = stored.to(torch.float32)
        if not all_finite(weight):
            raise not_finite(f"{name}.weight")
        result = quantize_rtn(weight, scheme.weights, stored.dtype)
        bits = scheme.weights.bits_per_weight(weight.shape[1], weight.shape[0], scale_bits=8 * stored.dtype.itemsize)
        return (
            LinearRecord(
                name=name,
                block=index,
                scheme=scheme.name,
                group_size=scheme.weights.group_size,
                method="rtn",
                bits_per_weight=bits,
                relative_error=result.relative_error,
            ),
            result,
        )

    def _put_away(
        self, name: str, record: LinearRecord, result: QuantizedWeight
    ) -> tuple[LinearRecord, QuantizedWeight]:
        """Write an expert's Linear at once: the codes of all experts of a block may not fit in memory."""
        if EXPERT_MODULE.match(name) is None:
            return record, result
        if self.ranks.first:
            self._write_linear(name, result)
        return record, WRITTEN

    def _write_linear(self, name: str, result: QuantizedWeight) -> None:
        packed = pack(self.work.schemes[name], result.codes, result.scales, result.zero_points)
        self._layout.write(self.run.checkpoint, {f"{name}.{leaf}": t for leaf, t in packed.items()})
        self._digests[f"{name}.weight"] = digest_of(self.checkpoint.read(f"{name}.weight"))

    def _write_block(self, index: int, solved: Solved) -> None:
        layout, digests = self._layout, self._digests
        for name, (_, result) in solved.linears.items():
            if result is not WRITTEN:
                self._write_linear(name, result)
        for name, tensor in solved.rewritten.items():
            layout.write(self.run.checkpoint, {name: tensor})
            digests[name] = digest_of(self.checkpoint.read(name))
        for name in self.work.blocks.block_tensors(index):
            if name not in digests:
                digests[name] = layout.copy(self.run.checkpoint, self.checkpoint, name)

    def _save(
        self,
        layout: Layout,
        stream: Stream | None,
        stage: int,
        digests: dict[str, str],
        write: Callable[[], None] | None = None,
        keep: Callable[[], None] | None = None,
        **facts: Any,
    ) -> None:
        """Make a stage durable: tensors, then hidden states, then the journal that vouches for them."""
        ranks = self.ranks.aside
        with ranks.sharing():
            if write is not None:
                write()
            if ranks.first:
                layout.sync(self.run.checkpoint)
            if keep is not None:
                keep()
            ranks.agree()
            self.run.record(stage, digests=dict(digests), **facts)
            ranks.agree()
            if stream is not None:
                stream.forget(stage - 1)

    def _await_save(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def _report(self, index: int, records: list[LinearRecord], timings: list[dict[str, Any]]) -> None:
        self.reporter.advance()
        total = self.work.blocks.num_blocks
        facts = [f"block {index + 1}/{total}:"]
        if records:
            bits = sum(r.bits_per_weight for r in records) / len(records)
            worst = max(records, key=lambda r: r.relative_error)
            mean = sum(r.relative_error for r in records) / len(records)
            short = worst.name.removeprefix(f"{self.work.blocks.prefix}.{index}.")
            facts.append(f"{bits:.2f} bits, relative error {mean:.2e} (most {worst.relative_error:.2e} at {short}),")
        remaining = sum(t["seconds"] for t in timings) / len(timings) * (total - index - 1)
        facts.append(
            f"{timings[-1]['seconds']:.1f} s, peak {timings[-1]['peak_bytes'] / 2**30:.2f} GiB, ETA {remaining:.0f} s"
        )
        self.reporter.say(" ".join(facts))


def held_in(folder: Path) -> int:
    """Bytes of disk that files in a folder take, which an interrupted run may have left there."""
    return sum(512 * f.stat().st_blocks for f in folder.glob("*") if f.is_file())


@dataclass(slots=True)
class Stream:
    """This rank's share of the calibration set on its way through the blocks.

    ``states`` is what the quantised model makes of it. Where blocks are tuned, on the batches ``taught`` (numbers among
    those of all ranks), ``originals`` is what the original model makes of this rank's part of them, one block ahead
    while a block is worked on: the block's target. ``entering`` is what these enter the first block with, on disk,
    where all scales are tuned together in the end.
    """

    model: StreamedModel
    batches: list[Batch]
    rows: list[torch.Tensor | None]
    samples: list[list[int]]
    arguments: list[list[Arguments]]
    states: HiddenStates
    ranks: Ranks
    tuning: TuningOptions | None = None
    taught: list[int] = field(default_factory=list)
    originals: HiddenStates | None = None
    entering: HiddenStates | None = None
    routes: dict[tuple[type, tuple[str, ...]], Route | None] = field(default_factory=dict)
    pairs: dict[tuple[type, tuple[str, ...]], dict[int, Pair]] = field(default_factory=dict)
    norms: dict[tuple[type, tuple[str, ...]], Norms] = field(default_factory=dict)

    @staticmethod
    def begin(
        model: StreamedModel,
        calibration: Calibration,
        run: RunFolder,
        reporter: Reporter,
        ranks: Ranks,
        *,
        offload: bool,
        tuning: TuningOptions | None,
        end_to_end: EndToEndOptions | None,
    ) -> Stream:
        """Embed every batch and record how blocks are called; on resume the hidden states come from disk."""
        tokens = tokens_per_batch(model.device.type, tuned=tuning is not None)
        everything = calibration.batches(tokens)
        require_batches(len(everything), ranks, tokens)
        batches = ranks.share(everything)
        shapes = [(b.token_ids.shape[0], b.token_ids.shape[1]) for b in batches]
        width = int(model.weights.checkpoint.text_config["hidden_size"])
        dtype = model.dtype
        states = HiddenStates(run.state_of(ranks.rank), shapes, width, dtype, offload)
        taught = [] if tuning is None else samples_chosen(tuning, len(everything))
        own = [g // ranks.world for g in taught if g % ranks.world == ranks.rank]
        originals = entering = None
        if own:
            kept_shapes = [shapes[i] for i in own]
            originals = HiddenStates(run.state_of(ranks.rank), kept_shapes, width, dtype, offload, "original")
            if end_to_end is not None:
                entering = HiddenStates(run.state_of(ranks.rank), kept_shapes, width, dtype, True, "entering")
        vocabulary = torch.unique(torch.cat([b.token_ids.flatten() for b in batches]))
        interner = Interner()
        arguments = []
        reporter.start("embedding the calibration text", len(batches))
        with model.embeddings(vocabulary, pictures=any(b.inputs is not None for b in batches)):
            for i, batch in enumerate(batches):
                inputs = None if batch.inputs is None else batch.inputs()
                hidden, calls = model.embed(batch.token_ids, interner, inputs)
                arguments.append(calls)
                if run.fresh:
                    states.write(i, hidden, stage=0)
                    for kept in (originals, entering) if i in own else ():
                        if kept is not None:
                            kept.write(own.index(i), hidden, stage=0)
                reporter.advance()
        batches = [replace(b, inputs=None) for b in batches]  # pictures have done their part
        stream = Stream(
            model,
            batches,
            [real_rows(b) for b in batches],
            [list(b.samples) for b in batches],
            arguments,
            states,
            ranks,
            tuning,
            taught,
            originals,
            entering,
        )
        if not run.fresh:
            for kept in stream._needed(int(run.journal["stage"])):
                kept.resume(int(run.journal["stage"]))
        return stream

    def _needed(self, stage: int) -> list[HiddenStates]:
        """What a run that goes on at a stage has to find: behind the last block only what all scales are tuned by."""
        behind = stage == self.model.num_blocks
        found = [None if behind else self.states, None if behind and self.entering is None else self.originals]
        return [kept for kept in found if kept is not None]

    def saver(self, stage: int) -> Callable[[], None]:
        """What makes hidden states durable as they are now, called while the next block is worked on."""
        savers = [kept.saver(stage) for kept in self._needed(stage)]
        if stage == 0 and self.entering is not None:
            savers.append(self.entering.saver(0))

        def save() -> None:
            for each in savers:
                each()
            savers.clear()  # and let go of what they hold

        return save

    def forget(self, stage: int) -> None:
        for kept in (self.states, self.originals):
            if kept is not None:
                kept.forget(stage)

    def turn(self, stage: int) -> None:
        for kept in (self.states, self.originals):
            if kept is not None:
                kept.turn(stage)

    @property
    def own(self) -> list[int]:
        """This rank's batches among those taught, as it numbers them."""
        return [g // self.ranks.world for g in self.taught if g % self.ranks.world == self.ranks.rank]

    def aim(self, block: nn.Module, index: int) -> None:
        """Move the original model's hidden states past a block that still has its own weights."""
        if self.originals is None:
            return
        for j, i in enumerate(self.own):
            hidden = self.originals.read(j).to(self.model.device, self.model.dtype, non_blocking=True)
            self.originals.write(j, run_block(block, hidden, self.arguments[i][index]), stage=index + 1)
        self.originals.turn(index + 1)

    def samples_of(self, index: int) -> list[Sample]:
        """What a block is tuned on: its inputs in the quantised model, its outputs in the original one."""
        device, dtype, own = self.model.device, self.model.dtype, self.own

        def sample(number: int) -> Sample:
            i, owner = divmod(number, self.ranks.world)
            originals = self.originals
            if owner != self.ranks.rank or originals is None:
                return Sample.elsewhere(owner)
            return Sample(
                hidden=lambda: self.states.read(i).to(device, dtype, non_blocking=True),
                target=lambda: originals.read(own.index(i)).to(device, dtype, non_blocking=True),
                run=self.arguments[i][index].run,
                rows=self.rows[i],
                owner=owner,
            )

        return [sample(g) for g in self.taught]

    def run(self, block: nn.Module, index: int, batch: int) -> torch.Tensor:
        """The block's output for one of this rank's batches, ``[batch, tokens, hidden]``."""
        hidden = self.states.read(batch).to(self.model.device, self.model.dtype, non_blocking=True)
        return run_block(block, hidden, self.arguments[batch][index])

    def at_once(
        self,
        block: nn.Module,
        index: int,
        linears: Mapping[str, nn.Linear],
        formats: Mapping[str, ActivationFormat],
        recipe: Recipe,
    ) -> AtOnce:
        """A walk through a block in one pass."""
        layers = self.model.expert_layers(index, linears)
        return AtOnce(
            partial(self.run, block, index),
            self.rows,
            {n: m for n, m in linears.items() if EXPERT_MODULE.match(n) is None},
            self.model.device,
            formats,
            self.ranks,
            layers,
            Shelf(self.states.folder if self.states.offload else None),
            recipe.experts.rare_tokens,
            recipe.experts.all_tokens,
        )

    @contextlib.contextmanager
    def walk(
        self,
        block: nn.Module,
        index: int,
        linears: Mapping[str, nn.Linear],
        formats: Mapping[str, ActivationFormat],
        recipe: Recipe,
    ) -> Iterator[Walk]:
        """The way through a block: stage by stage where it can be, all Linears at once where it cannot."""
        plain = self.at_once(block, index, linears, formats, recipe)
        run, steps = plain.run, recipe.gptq
        leaves: dict[str, Leaf] = {**plain.linears, **{n: layer.module for n, layer in plain.layers.items()}}
        route = self._route(block, index, leaves, run) if steps.true_sequential and leaves else None
        if route is None:
            yield plain
            return
        tokens = sum(b.token_ids.numel() for b in self.batches)
        kept = route.kept_bytes(leaves, tokens, self.states.dtype.itemsize)
        room = room_for_kept(self.model.device)
        shelf = Shelf(self.states.folder if self.states.offload or kept > room else None)
        smooth = steps.smoothing and any(f.kind == "int" for f in formats.values())
        pairs = self._pairs(block, index, plain.linears, route, run) if smooth else {}
        try:
            yield Sequential(
                block,
                leaves,
                route,
                run,
                self.rows,
                self.model.device,
                shelf,
                formats,
                self.ranks,
                pairs,
                plain.layers,
                plain.rare,
                plain.everything,
            )
        finally:
            shelf.clear()

    def _route(
        self, block: nn.Module, index: int, leaves: Mapping[str, Leaf], run: Callable[[int], torch.Tensor]
    ) -> Route | None:
        """Learnt once for all blocks of a kind, and spelt with this block's names."""
        kind, prefix = kind_of(block, self.model, index, leaves), f"{self.model.disk_prefix}.{index}."
        short = {n.removeprefix(prefix): m for n, m in leaves.items()}
        if kind not in self.routes:
            self.routes[kind] = self.ranks.decide(lambda: learn_route(block, short, lambda: run(0)))
        known = self.routes[kind]
        return None if known is None else known.renamed(prefix)

    def norms_of(self, block: nn.Module, index: int, linears: Mapping[str, nn.Linear]) -> Norms:
        """A block's norms: found once for all blocks of a kind."""
        kind = kind_of(block, self.model, index, linears)
        if kind not in self.norms:
            self.norms[kind] = self.ranks.decide(lambda: find_norms(block, lambda: self.run(block, index, 0)))
        return self.norms[kind]

    def _pairs(
        self,
        block: nn.Module,
        index: int,
        linears: Mapping[str, nn.Linear],
        route: Route,
        run: Callable[[int], torch.Tensor],
    ) -> dict[int, Pair]:
        """Found once for all blocks of a kind, and spelt with this block's names. Experts take no part."""
        if not self.model.resident(index):
            return {}
        kind, prefix = kind_of(block, self.model, index, linears), f"{self.model.disk_prefix}.{index}."
        if kind not in self.pairs:
            short = {n.removeprefix(prefix): m for n, m in linears.items()}
            dense = {i: names for i, names in enumerate(route.stages) if names[0] in linears}
            stages = [[n.removeprefix(prefix) for n in names] for names in dense.values()]
            found = self.ranks.decide(lambda: find_pairs(short, stages, lambda: run(0)))
            self.pairs[kind] = {list(dense)[i]: pair for i, pair in found.items()}
        return {stage: pair.renamed(prefix) for stage, pair in self.pairs[kind].items()}

    def overflow(self, block: nn.Module, index: int, where: str) -> NumericsError:
        """What to say of a second moment that is not finite: which module and sample made it so, if they show."""
        try:
            for i in range(len(self.batches)):
                self._require_finite(block, index, i, self.run(block, index, i))
        except NumericsError as e:
            return e
        self.ranks.agree()  # the culprit may be in another rank's batches
        return NumericsError(
            "the second moment of the calibration inputs is not finite",
            where=where,
            why="their squares overflow float32",
            remedy="Check the source weights with `halfbyte inspect`, or calibrate with other text.",
        )

    def advance(self, block: nn.Module, index: int, walk: Walk) -> None:
        """Move on to what enters the next block; anything but finite numbers stops it, naming module and sample."""
        for i, output in enumerate(walk.outputs()):
            self._require_finite(block, index, i, output)
            self.states.write(i, output, stage=index + 1)

    def _require_finite(self, block: nn.Module, index: int, batch: int, output: torch.Tensor) -> None:
        hidden = self.states.read(batch).to(self.model.device, self.model.dtype, non_blocking=True)
        name = f"{self.model.disk_prefix}.{index}"
        require_finite(block, name, hidden, output, self.arguments[batch][index], self.samples[batch])


def room_for_kept(device: torch.device) -> int:
    """What may wait in memory between the stages of a block: on a GPU, half of what is free there."""
    return KEPT_IN_MEMORY if device.type == "cpu" else max(KEPT_IN_MEMORY, torch.cuda.mem_get_info(device)[0] // 2)


def open_run(out: Path, options: dict[str, Any], ranks: Ranks, *, resume: bool) -> RunFolder:
    """The run folder: opened and locked by the first rank."""
    run = RunFolder.open(out, options, resume=resume) if ranks.first else None
    journal = ranks.decide(lambda: {} if run is None else run.journal)
    return run or RunFolder.beside(out, journal)


def require_work_for_all(size: CalibrationWork, ranks: Ranks, tokens: int) -> None:
    """Stop before long work where there cannot be a batch for every rank."""
    if ranks.world == 1:
        return
    if not size.observed:
        needs = "no calibration" if size.spec is None else "calibration only for the target bits"
        raise UsageError(
            f"rounding to nearest needs {needs}, so there is nothing that {ranks.world} processes could share",
            where="--method rtn",
            remedy="Run it without torchrun.",
        )
    if size.tuning is not None and size.tuning.code_rate > 0:
        raise UsageError(
            "codes are tuned in one process only",
            where="tune_codes under [gptq] in the recipe",
            why=f"each step's gradients of all weights of a block would have to go to all {ranks.world} processes",
            remedy="Run it without torchrun, or leave tune_codes out.",
        )
    require_batches(-(-size.samples // max(1, tokens // size.seq_len)), ranks, tokens, at_most="at most ")


def require_batches(batches: int, ranks: Ranks, tokens: int, *, at_most: str = "") -> None:
    """Stop where some rank would have no batch. ``tokens`` are those in one, ``at_most`` words for an upper bound."""
    if batches < ranks.world:
        fewer = "Run it without torchrun" if batches == 1 else f"Start at most {batches}"
        raise UsageError(
            f"the calibration set makes {at_most}{counted(batches, 'batch', 'batches')} of {tokens} tokens, "
            f"too few for {ranks.world} processes",
            where="--nproc-per-node",
            remedy=f"{fewer}, or take more --samples.",
        )


def kind_of(
    block: nn.Module, model: StreamedModel, index: int, linears: Mapping[str, nn.Module]
) -> tuple[type, tuple[str, ...]]:
    """Blocks of one kind are wired alike."""
    prefix = f"{model.disk_prefix}.{index}."
    return type(block), tuple(n.removeprefix(prefix) for n in linears)


def real_rows(batch: Batch) -> torch.Tensor | None:
    """Which flattened positions are tokens and not padding; ``None`` when all are."""
    longest = batch.token_ids.shape[1]
    if bool((batch.lengths == longest).all()):
        return None
    return (torch.arange(longest) < batch.lengths.unsqueeze(1)).flatten()


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", where="--device", remedy="Use auto, cpu or cuda.")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("torch sees no CUDA device", where="--device cuda", remedy="Use --device cpu.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what shapes the output."""
    packages = ["halfbyte", "torch", "transformers", "compressed-tensors", "numba"]
    if device.type == "cuda" and find_spec("triton") is not None:
        packages.append("triton")
    return {p: version(p) for p in packages}


def describe(record: CalibrationRecord) -> str:
    return f"calibration: {record.samples} sequences, {record.tokens:,} tokens ({record.description or record.spec})"
