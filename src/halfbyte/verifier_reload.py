"""Loading a checkpoint with transformers, and holding it against the reference decoder.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.

Two models are made (:mod:`halfbyte.verifier_models`): what transformers makes of the checkpoint, and the reference.
They must agree in every stored value, bit for bit, and then in their logits.

Activations are quantised by the engine at run time and nothing about it is stored, so ``logits`` compares both models
without it. Where a scheme quantises activations, ``activations`` then loads the checkpoint compressed, lets
transformers quantise them (by token, or by group of its features, s = 2 max|x| / (q_max - q_min), i.e. max|x| / 127.5
for 8-bit integers) and compares each Linear's outputs, on the inputs that it gets, with those of the reference's under
the same formula, written here once more. (Logits would not do for mixtures, where a rounding that tips the other way
sends a token to another expert.) vLLM divides by 127 instead; that is not compared.

The first model is reduced to hashes and logits before the second is built, so the peak is about twice the dense size.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from halfbyte.progress import Reporter
from halfbyte.records import Check
from halfbyte.reference import StoredTensor
from halfbyte.verifier_fused import lack, stack_names
from halfbyte.verifier_layout import QuantizedModule
from halfbyte.verifier_models import Loaded, Stored, first_line, load, quiet, reference, single_experts

PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time, in a village by the sea, there lived",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
MAX_PROMPT_TOKENS = 64
LOGITS_TOLERANCE = 1e-3  # relative root mean square; equal weights give 0 on the same machine
ACTIVATION_TOLERANCE = 1e-2  # the same; a code that rounds the other way moves one input by one step
COPIES_IN_MEMORY = 2.5  # two models, and a compressed one beside its dense form where activations are compared
MARGIN_BYTES = 1 << 30
RELOAD_CHECKS = ("reload", "weights", "logits")


def reload_checks(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    modules: Sequence[QuantizedModule],
    *,
    model_type: str,
    wanted: bool | None,
    prompts: Sequence[str] | None,
    reporter: Reporter,
) -> list[Check]:
    """The checks ``reload``, ``weights``, ``logits`` and, where activations are quantised, ``activations``."""
    reason = _reason_to_skip(tensors, modules, model_type, wanted)
    if reason:
        return [Check(name=n, status="skipped", detail=reason) for n in RELOAD_CHECKS]
    reporter.start("reloading with transformers", 3)
    try:
        with quiet(), torch.no_grad():
            return _compare(Stored(folder=folder, tensors=tensors, modules=modules), prompts, reporter)
    except Exception as e:  # whatever transformers raises is the finding
        return [
            Check(name="reload", status="failed", detail="transformers cannot load it", problems=[first_line(e)]),
            *(Check(name=n, status="skipped", detail="it could not be loaded") for n in RELOAD_CHECKS[1:]),
        ]
    finally:
        reporter.finish()


def _reason_to_skip(
    tensors: Mapping[str, StoredTensor], modules: Sequence[QuantizedModule], model_type: str, wanted: bool | None
) -> str:
    if wanted is False:
        return "not wanted (--no-reload)"
    if model_type not in transformers.CONFIG_MAPPING:
        return f"transformers {transformers.__version__} has no model type {model_type!r}, and remote code is never run"
    undecodable = [m.name for m in modules if not m.decodable]
    if undecodable:
        return f"the reference decoder does not cover {undecodable[0]}"
    groups = {m.group.name: "weight_zero_point" in m.parts for m in modules if m.group}
    if len(groups) > 1 and any(groups.values()):
        return "transformers cannot load an asymmetric group beside others"
    owned = {t.name for m in modules for t in m.parts.values()}
    elements = sum(t.numel for n, t in tensors.items() if n not in owned)
    for m in modules:
        rows, columns = _shape(m)
        elements += rows * columns
    needed = int(COPIES_IN_MEMORY * 2 * elements) + MARGIN_BYTES
    free = available_bytes()
    if wanted is None and needed > free:
        copies = f"{COPIES_IN_MEMORY} dense copies"
        return f"it needs about {needed / 1e9:.1f} GB ({copies}), {free / 1e9:.1f} GB of memory are free"
    return ""


def _shape(module: QuantizedModule) -> tuple[int, int]:
    if "weight_shape" in module.parts:
        rows, columns = module.parts["weight_shape"].rows()
        return int(rows), int(columns)
    rows, columns = module.parts["weight"].shape
    return rows, columns


def available_bytes() -> int:
    """Memory that can be had without swapping: the kernel's estimate where there is one, else free pages."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What is kept of the reloaded model.

    Attributes:
        stored: digests of its state dict.
        logits: of the prompts.
        architecture, dtype, experts: what the reference model is made like.
        problems: about its keys; loaded: which model it is, in words.
    """

    stored: dict[str, str]
    logits: list[torch.Tensor]
    architecture: type[Any]
    dtype: torch.dtype
    experts: Mapping[str, type[Any]]
    problems: list[str]
    loaded: str


def _compare(stored: Stored, prompts: Sequence[str] | None, reporter: Reporter) -> list[Check]:
    config = stored.config()
    groups = config.quantization_config["config_groups"]
    tokens, how = _tokens(stored.folder, config, prompts)
    one_group, known_lack = len(groups) == 1, lack(stored.modules, len(groups))
    seen, missing = _reloaded(stored, tokens, known_lack, dequantize=one_group)
    reporter.advance()
    made = reference(stored, seen.architecture, seen.experts, seen.dtype)
    dense, expected = made.model, _digests(made.model)
    differing = [n for n in sorted(expected) if seen.stored.get(n) != expected[n]]
    if known_lack and not missing and differing and set(differing) <= stack_names(dense, stored.modules):
        seen, missing = _observed(stored, tokens, dequantize=one_group, apart=True), known_lack
        differing = [n for n in sorted(expected) if seen.stored.get(n) != expected[n]]
    checks = [_reload_check(seen, missing)]
    problems = [f"in the reference model: {p}" for p in made.problems]
    problems += [f"{n}: the reloaded value is not that of the reference decoder" for n in differing]
    by_library = "; experts as compressed-tensors decodes them" if missing else ""
    detail = f"{len(expected)} tensors of the reloaded model equal the reference decoder's bit for bit{by_library}"
    checks.append(_outcome("weights", problems, detail if not problems else f"{len(problems)} differ"))
    reporter.advance()
    checks.append(_logits_check("logits", seen.logits, _logits(dense, tokens), LOGITS_TOLERANCE, how))
    reporter.advance()
    if any(g.get("input_activations") for g in groups.values() if isinstance(g, dict)):
        checks.append(_activations_check(stored, dense, tokens, how, apart=bool(missing)))
    return checks


def _reloaded(
    stored: Stored, tokens: Sequence[torch.Tensor], known_lack: str, *, dequantize: bool
) -> tuple[Observed, str]:
    """The reloaded model, and what transformers lacks to load its experts: then these are put in by hand."""
    try:
        loaded = load(stored, dequantize=dequantize)
        if not loaded.lacks_experts:
            return _observe(loaded, tokens), ""
        missing = "knows the experts of this architecture in one stack only"
        del loaded
    except RuntimeError as e:
        if not known_lack or "conversion" not in str(e):
            raise
        missing = known_lack
    gc.collect()
    return _observed(stored, tokens, dequantize=dequantize, apart=True), missing


def _observed(stored: Stored, tokens: Sequence[torch.Tensor], *, dequantize: bool, apart: bool) -> Observed:
    return _observe(load(stored, dequantize=dequantize, apart=apart), tokens)


def _observe(loaded: Loaded, tokens: Sequence[torch.Tensor]) -> Observed:
    """Reduce a model to what is compared of it."""
    model = loaded.model
    words = f"{type(model).__name__} in {_dtype_name(model)}, transformers {transformers.__version__}"
    if loaded.predictors:
        words += f"; it does not read {loaded.predictors} tensors of layers behind the last (multi-token prediction)"
    seen = Observed(
        logits=_logits(model, tokens, quantize_activations=False),
        stored=_digests(model),
        architecture=type(model),
        dtype=model.dtype,
        experts=single_experts(model),
        problems=loaded.problems,
        loaded=words,
    )
    del model, loaded.model
    gc.collect()
    return seen


def _reload_check(seen: Observed, missing: str) -> Check:
    if not missing or seen.problems:
        return _outcome("reload", seen.problems, seen.loaded)
    detail = (
        f"transformers {transformers.__version__} {missing}; vLLM reads them one by one, as they are stored. All else "
        f"was loaded ({seen.loaded}), and the experts put in as compressed-tensors decodes them"
    )
    return Check(name="reload", status="skipped", detail=detail)


def _outcome(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, status="failed" if problems else "passed", detail=detail, problems=problems)


def _digests(model: Any) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of every entry of the state dict."""
    digests = {}
    for name, tensor in model.state_dict().items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
        digests[name] = digest.hexdigest()
    return digests


def _tokens(folder: Path, config: Any, prompts: Sequence[str] | None) -> tuple[list[torch.Tensor], str]:
    """Token ids ``[1, length]`` of the prompts; fixed ids where there is no tokenizer."""
    vocabulary = int(config.get_text_config().vocab_size)
    with contextlib.suppress(Exception):  # no tokenizer, or one that this transformers cannot read
        next(f for f in TOKENIZER_FILES if (folder / f).is_file())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        encoded = [tokenizer(p).input_ids[:MAX_PROMPT_TOKENS] for p in prompts or PROMPTS]
        if all(ids and max(ids) < vocabulary for ids in encoded):
            return [torch.tensor([ids]) for ids in encoded], f"{len(encoded)} prompts"
    fixed = [[(1 + 7 * i + 13 * j) % vocabulary for i in range(8 + 4 * j)] for j in range(3)]
    return [torch.tensor([ids]) for ids in fixed], "3 fixed token sequences (no usable tokenizer)"


def _logits(model: Any, tokens: Sequence[torch.Tensor], *, quantize_activations: bool = False) -> list[torch.Tensor]:
    """float32 logits of every sequence; compressed-tensors' activation quantisation is switched on or off."""
    for module in model.modules():
        module.quantization_enabled = quantize_activations
    return [model(ids, use_cache=False).logits.float() for ids in tokens]


def _logits_check(
    name: str, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float, how: str
) -> Check:
    a, b = torch.cat([t.reshape(-1) for t in actual]), torch.cat([t.reshape(-1) for t in expected])
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return _outcome(name, ["logits are not finite"], how)
    distance = float((a - b).double().norm() / b.double().norm().clamp(min=1e-30))
    largest = float((a - b).abs().max())
    detail = f"{how}: relative difference {distance:.2g} (limit {tolerance:g}), largest {largest:.2g}"
    problems = [f"logits differ from the reference model's by {distance:.2g}"] if distance > tolerance else []
    return _outcome(name, problems, detail)


def _activations_check(
    stored: Stored, reference: Any, tokens: Sequence[torch.Tensor], how: str, *, apart: bool
) -> Check:
    """Every Linear with quantised activations, on the inputs that it gets, against :func:`_fake_quantize` before the
    reference's."""
    loaded = load(stored, dequantize=False, apart=apart)
    model = loaded.model
    distances: dict[str, Distance] = {}
    for name, module in model.named_modules():
        scheme = module.__dict__.get("quantization_scheme")
        if scheme is None or scheme.input_activations is None:
            continue
        args = scheme.input_activations
        if args.strategy not in ("token", "group") or not args.dynamic or not args.symmetric or args.num_bits != 8:
            detail = f"{name}: only dynamic symmetric activations by token or group are simulated"
            return Check(name="activations", status="skipped", detail=detail)
        distances[name] = Distance(reference.get_submodule(name), args.type == "float", args.group_size)
        module.register_forward_hook(distances[name])
    _logits(model, tokens, quantize_activations=True)
    far = {n: d.relative for n, d in distances.items() if not d.relative <= ACTIVATION_TOLERANCE}
    problems = [f"loaded compressed: {p}" for p in loaded.problems]
    problems += [f"{n}: outputs differ from the reference arithmetic's by {far[n]:.2g}" for n in far]
    worst = max((d.relative for d in distances.values()), default=0.0)
    detail = (
        f"{how}, {len(distances)} modules: relative difference at most {worst:.2g} (limit {ACTIVATION_TOLERANCE:g})"
    )
    if stack_names(model, stored.modules):
        detail += "; experts left out, which transformers computes with activations as they are"
    return _outcome("activations", problems, detail)


@dataclass(slots=True)
class Distance:
    """A hook that sums up how far a Linear's outputs are from those of its twin in the reference model."""

    twin: torch.nn.Module
    floating: bool
    group_size: int | None
    squares: float = 0.0
    energy: float = 0.0

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0]
        if self.group_size is None:
            quantized = _fake_quantize(x, self.floating, tuple(range(2, x.dim())))
        else:
            quantized = _fake_quantize(x.reshape(*x.shape[:-1], -1, self.group_size), self.floating, (-1,)).flatten(-2)
        expected = _first(self.twin(quantized)).double()
        self.squares += float((_first(output).double() - expected).square().sum())
        self.energy += float(expected.square().sum())

    @property
    def relative(self) -> float:
        return math.sqrt(self.squares / max(self.energy, 1e-60))


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _fake_quantize(x: torch.Tensor, floating: bool, dims: tuple[int, ...]) -> torch.Tensor:
    """``q s`` with ``s = max|x| / (448 or 127.5)`` over some dimensions, ``q = round(x / s)`` to e4m3 or int8.

    No dimension means all. compressed-tensors takes those behind the first two for a token's: where a model calls a
    Linear with ``[tokens, features]``, as mixtures do, all tokens have one scale.
    """
    scale = x.abs().amax(dims, keepdim=True) / (448.0 if floating else 127.5)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if floating:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return (x / scale).clamp(-128, 127).round() * scale


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
