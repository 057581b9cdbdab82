"""The models that ``verify`` compares: what transformers makes of a checkpoint, and the reference beside it.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.

The *reloaded* model is what transformers and compressed-tensors make of the checkpoint; the *reference* has the same
architecture, dense, with the weights of :mod:`halfbyte.reference` cast to the loaded dtype and every other tensor as it
is on disk.

How the reloaded model is made depends on the config. With one group, ``dequantize`` makes transformers decode while
loading. With several groups that path decodes everything by the first one, so the modules are loaded compressed and
decoded by compressed-tensors at the first forward; compressed-tensors 0.20 cannot do that for asymmetric groups. For
experts that transformers cannot load see :mod:`halfbyte.verifier_fused`.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from halfbyte.reference import StoredTensor, decode
from halfbyte.verifier_experts import place_of
from halfbyte.verifier_fused import fill, fused_modules, is_expert, library_decoder, stack_names
from halfbyte.verifier_layout import QuantizedModule, Skeleton

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
LAYER = re.compile(r"(?P<path>.*\.layers)\.(?P<number>\d+)\.(?P<rest>.+)")
# What layers of multi-token prediction have and others do not.
PREDICTOR = "eh_proj.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A checkpoint to make models of.

    Attributes:
        folder: where it is.
        tensors: all of it, by name.
        modules: what is quantised, all of it decodable.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    modules: Sequence[QuantizedModule]

    def config(self) -> Any:
        return transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False)

    def dense(self) -> dict[str, torch.Tensor]:
        """Tensors of everything that is not quantised."""
        owned = {t.name for m in self.modules for t in m.parts.values()}
        return {n: as_torch(t) for n, t in self.tensors.items() if n not in owned}

    def without_experts(self) -> dict[str, torch.Tensor]:
        """All tensors as they are stored, but for those of quantised experts."""
        experts = {t.name for m in self.modules if place_of(m.name) for t in m.parts.values()}
        return {n: as_torch(t) for n, t in self.tensors.items() if n not in experts}


@dataclass(slots=True)
class Loaded:
    """A model and what was said about its keys.

    Attributes:
        problems: missing, unexpected and mismatched keys, and other messages; not those of experts that it lacks.
        lacks_experts: whether all stacks are missing in which the quantised experts belong.
        predictors: tensors of layers behind the last one, which transformers does not have.
    """

    model: Any
    problems: list[str]
    lacks_experts: bool
    predictors: int

    @staticmethod
    def of(model: Any, info: Mapping[str, Any], stored: Stored) -> Loaded:
        model.eval()
        layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
        unexpected = sorted(map(str, info["unexpected_keys"]))
        further = predictors(unexpected, layers)
        missing, stacks = set(map(str, info["missing_keys"])), stack_names(model, stored.modules)
        lacking = bool(stacks) and stacks <= missing
        keys = {
            "missing": missing - (stacks if lacking else set()),
            "unexpected": {k for k in unexpected if k not in further and not (lacking and is_expert(k))},
            "mismatched": set(map(str, info["mismatched_keys"])),
        }
        problems = [f"{kind} key {key}" for kind, found in keys.items() for key in sorted(found)]
        return Loaded(model, problems + [str(m) for m in info["error_msgs"]], lacking, len(further))


def predictors(keys: Sequence[str], layers: int) -> set[str]:
    """Those of some keys that belong to layers of multi-token prediction, behind the last of ``layers``."""
    matches = [m for m in map(LAYER.fullmatch, keys) if m and int(m["number"]) >= layers]
    further = {(m["path"], m["number"]) for m in matches if m["rest"] == PREDICTOR}
    return {m[0] for m in matches if (m["path"], m["number"]) in further}


def build_skeleton(folder: Path) -> tuple[Skeleton, str]:
    """The model's module classes and Linear shapes, built without memory; empty with the reason where that fails."""
    try:
        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = model_class(config)(config)
    except Exception as e:  # transformers raises whatever a config makes it stumble over
        return Skeleton({}, {}), f"transformers cannot build the model ({first_line(e)})"
    classes = {n: frozenset(c.__name__ for c in type(m).__mro__) for n, m in model.named_modules()}
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return Skeleton(classes, shapes, fused_modules(model)), ""


def load(stored: Stored, *, dequantize: bool, apart: bool = False) -> Loaded:
    """What transformers makes of a checkpoint.

    Args:
        stored: the checkpoint.
        dequantize: whether transformers decodes while loading; else at the first forward, which is made here.
        apart: give transformers all but the quantised experts, and put those in as compressed-tensors decodes them.
    """
    config = stored.config()
    config.quantization_config["dequantize"] = dequantize
    quantization = dict(config.quantization_config)
    source = {"state_dict": stored.without_experts()} if apart else {"use_safetensors": True, "local_files_only": True}
    model, info = model_class(config).from_pretrained(
        None if apart else stored.folder,
        config=config,
        dtype="auto",
        trust_remote_code=False,
        output_loading_info=True,
        **source,
    )
    loaded = Loaded.of(model, info, stored)
    if apart and loaded.lacks_experts:
        loaded.problems += fill(model, stored.modules, library_decoder(quantization, model.dtype, as_torch))
    if not dequantize:
        model(torch.zeros(1, 1, dtype=torch.long))  # compressed-tensors decodes at the first forward
    return loaded


def single_experts(model: Any) -> dict[str, type[Any]]:
    """Modules that hold experts one by one, with their classes."""
    paths = {place.layer for n, _ in model.named_modules() if (place := place_of(n)) is not None}
    return {path: type(model.get_submodule(path)) for path in sorted(paths)}


def reference(stored: Stored, architecture: type[Any], experts: Mapping[str, type[Any]], dtype: torch.dtype) -> Loaded:
    """The same architecture, dense, from the reference decoder's weights; transformers maps the names.

    Args:
        stored: the checkpoint.
        architecture: the reloaded model's class.
        experts: :func:`single_experts` of the reloaded model. Where transformers takes fused experts apart because they
            are quantised (Llama 4), the reference has them alike.
        dtype: the reloaded model's.
    """
    config = stored.config()
    del config.quantization_config

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        architecture.__init__(self, config, *args, **options)
        for path, kind in experts.items():
            if type(self.get_submodule(path)) is not kind:
                self.set_submodule(path, kind(config.get_text_config()))

    def decoded(module: QuantizedModule) -> torch.Tensor:
        assert module.group is not None
        assert module.group.format is not None
        return torch.from_numpy(np.ascontiguousarray(decode(module.parts, module.group.format))).to(dtype)

    body = {"__init__": build, "__module__": architecture.__module__}
    state = stored.dense() | {f"{m.name}.weight": decoded(m) for m in stored.modules}
    like: Any = type(architecture.__name__, (architecture,), body)
    model, info = like.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    loaded = Loaded.of(model, info, stored)
    if loaded.lacks_experts:
        loaded.problems += fill(model, stored.modules, decoded)
    return loaded


def as_torch(tensor: StoredTensor) -> torch.Tensor:
    data = bytearray(tensor.read_bytes(0, tensor.size_bytes))
    if not data:
        return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def model_class(config: Any) -> Any:
    """The class that the config names, else the causal language model of its type. Never remote code."""
    names = config.architectures or []
    known = getattr(transformers, names[0], None) if names else None
    return known or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
