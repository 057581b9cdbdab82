"""Loading a checkpoint with transformers, and holding it against the reference decoder.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.

Two models are made. The *reloaded* one is what transformers and compressed-tensors make of the checkpoint; the
*reference* one has the same architecture, dense, with the weights of :mod:`halfbyte.reference` cast to the loaded dtype
and every other tensor as it is on disk. They must agree in every stored value, bit for bit, and then in their logits.

How the reloaded model is made depends on the config. With one group, ``dequantize`` makes transformers decode while
loading. With several groups that path decodes everything by the first one, so the modules are loaded compressed and
decoded by compressed-tensors at the first forward; compressed-tensors 0.20 cannot do that for asymmetric groups.

Activations are quantised by the engine at run time and nothing about it is stored, so ``logits`` compares both models
without it. Where a scheme quantises activations, ``activations`` then loads the checkpoint compressed, lets
transformers quantise them (by token, or by group of its features, s = 2 max|x| / (q_max - q_min), i.e. max|x| / 127.5
for 8-bit integers) and compares with the reference model under the same formula, written here once more. vLLM divides
by 127 instead; that is not compared.

The first model is reduced to hashes and logits before the second is built, so the peak is about twice the dense size.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from halfbyte.progress import Reporter
from halfbyte.records import Check
from halfbyte.reference import StoredTensor, decode
from halfbyte.verifier_layout import QuantizedModule, Skeleton

PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time, in a village by the sea, there lived",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
MAX_PROMPT_TOKENS = 64
LOGITS_TOLERANCE = 1e-3  # relative root mean square; equal weights give 0 on the same machine
ACTIVATION_TOLERANCE = 2e-2  # a code that rounds the other way moves one input by one step
COPIES_IN_MEMORY = 2.5  # two models, and a compressed one beside its dense form where activations are compared
MARGIN_BYTES = 1 << 30
RELOAD_CHECKS = ("reload", "weights", "logits")

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def build_skeleton(folder: Path) -> tuple[Skeleton, str]:
    """The model's module classes and Linear shapes, built without memory; empty with the reason where that fails."""
    try:
        with _quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = _model_class(config)(config)
    except Exception as e:  # transformers raises whatever a config makes it stumble over
        return Skeleton({}, {}), f"transformers cannot build the model ({_first_line(e)})"
    classes = {n: frozenset(c.__name__ for c in type(m).__mro__) for n, m in model.named_modules()}
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return Skeleton(classes, shapes), ""


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
        with _quiet(), torch.no_grad():
            return _compare(folder, tensors, modules, prompts, reporter)
    except Exception as e:  # whatever transformers raises is the finding
        return [
            Check(name="reload", status="failed", detail="transformers cannot load it", problems=[_first_line(e)]),
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


def _compare(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    modules: Sequence[QuantizedModule],
    prompts: Sequence[str] | None,
    reporter: Reporter,
) -> list[Check]:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    groups = config.quantization_config["config_groups"]
    activations = any(g.get("input_activations") for g in groups.values() if isinstance(g, dict))
    tokens, how = _tokens(folder, config, prompts)
    model, info = _load(folder, config, dequantize=len(groups) == 1)
    problems = _key_problems(info)
    logits = _logits(model, tokens, quantize_activations=False)
    loaded = f"{type(model).__name__} in {_dtype_name(model)}, transformers {transformers.__version__}"
    checks = [_outcome("reload", problems, loaded)]
    stored, dtype, architecture = _digests(model), model.dtype, type(model)
    del model
    gc.collect()
    reporter.advance()

    del config.quantization_config
    reference, info = _reference(architecture, config, tensors, modules, dtype)
    problems = [f"in the reference model: {p}" for p in _key_problems(info)]
    expected = _digests(reference)
    differing = [n for n in sorted(expected) if stored.get(n) != expected[n]]
    problems += [f"{n}: the reloaded value is not that of the reference decoder" for n in differing]
    detail = f"{len(expected)} tensors of the reloaded model equal the reference decoder's bit for bit"
    checks.append(_outcome("weights", problems, detail if not problems else f"{len(problems)} differ"))
    reporter.advance()
    checks.append(_logits_check("logits", logits, _logits(reference, tokens), LOGITS_TOLERANCE, how))
    reporter.advance()
    if activations:
        checks.append(_activations_check(folder, reference, tokens, how))
    return checks


def _outcome(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, status="failed" if problems else "passed", detail=detail, problems=problems)


def _load(folder: Path, config: Any, *, dequantize: bool) -> tuple[Any, Mapping[str, Any]]:
    config.quantization_config["dequantize"] = dequantize
    model, info = _model_class(config).from_pretrained(
        folder,
        config=config,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model.eval()
    if not dequantize:
        model(torch.zeros(1, 1, dtype=torch.long))  # compressed-tensors decodes at the first forward
    return model, info


def _reference(
    architecture: Any,
    config: Any,
    tensors: Mapping[str, StoredTensor],
    modules: Sequence[QuantizedModule],
    dtype: torch.dtype,
) -> tuple[Any, Mapping[str, Any]]:
    """The same architecture, dense, from the reference decoder's weights; transformers maps the names."""
    owned = {t.name for m in modules for t in m.parts.values()}
    state = {n: _as_torch(t) for n, t in tensors.items() if n not in owned}
    for m in modules:
        assert m.group is not None
        assert m.group.format is not None
        state[f"{m.name}.weight"] = torch.from_numpy(np.ascontiguousarray(decode(m.parts, m.group.format))).to(dtype)
    model, info = architecture.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    model.eval()
    return model, info


def _as_torch(tensor: StoredTensor) -> torch.Tensor:
    data = bytearray(tensor.read_bytes(0, tensor.size_bytes))
    if not data:
        return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _model_class(config: Any) -> Any:
    """The class that the config names, else the causal language model of its type. Never remote code."""
    names = config.architectures or []
    known = getattr(transformers, names[0], None) if names else None
    return known or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _key_problems(info: Mapping[str, Any]) -> list[str]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = [f"{kind.replace('_keys', '')} key {key}" for kind in kinds for key in sorted(map(str, info[kind]))]
    return problems + [str(m) for m in info["error_msgs"]]


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


def _activations_check(folder: Path, reference: Any, tokens: Sequence[torch.Tensor], how: str) -> Check:
    """Logits with activations quantised by compressed-tensors, and by :func:`_fake_quantize` in the reference model."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model, _ = _load(folder, config, dequantize=False)
    handles = []
    for name, module in model.named_modules():
        scheme = module.__dict__.get("quantization_scheme")
        if scheme is None or scheme.input_activations is None:
            continue
        args = scheme.input_activations
        if args.strategy not in ("token", "group") or not args.dynamic or not args.symmetric or args.num_bits != 8:
            detail = f"{name}: only dynamic symmetric activations by token or group are simulated"
            return Check(name="activations", status="skipped", detail=detail)
        hook = _activation_hook(args.type == "float", args.group_size)
        handles.append(reference.get_submodule(name).register_forward_pre_hook(hook))
    actual = _logits(model, tokens, quantize_activations=True)
    expected = _logits(reference, tokens)
    for handle in handles:
        handle.remove()
    return _logits_check("activations", actual, expected, ACTIVATION_TOLERANCE, f"{how}, {len(handles)} modules")


def _activation_hook(floating: bool, group_size: int | None) -> Any:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        groups = x.reshape(*x.shape[:-1], -1, group_size or x.shape[-1])
        return (_fake_quantize(groups, floating).reshape(x.shape), *inputs[1:])

    return hook


def _fake_quantize(x: torch.Tensor, floating: bool) -> torch.Tensor:
    """``q s`` with ``s = max|x| / (448 or 127.5)`` over the last dimension, ``q = round(x / s)`` to e4m3 or int8."""
    scale = x.abs().amax(-1, keepdim=True) / (448.0 if floating else 127.5)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if floating:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return (x / scale).clamp(-128, 127).round() * scale


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' log, warnings and progress bars off the terminal; what they say is in the checks."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
