"""``verify OUT --source FLAX``: Gemma 3 as orbax stores it, read once more, whole arrays at a time.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side: tensorstore lists
the arrays and reads them, and where each tensor of Hugging Face's Gemma 3 lies in them is written out here once more.

The numbers of the decoder's Linears are products of a code and a scale that is not stored, rounded to bfloat16 where
the training did: the products of what was made from them, rounded likewise, have to be these numbers, bit for bit.

Does not check that chunks are lost, which zarr reads as zeros: then the numbers differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import CheckpointError, MissingDependencyError
from halfbyte.reference import Float32
from halfbyte.verifier_converted import Contents, Weight, rounded

METADATA, MANIFEST = "_METADATA", "manifest.ocdbt"
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
LEFT_BEHIND = ("embedder/mm_output_embedding", "embedder/mm_input_embedding_extra")
# Einsums keep heads apart and put inputs before outputs; a Linear is [out, in].
Turn = Callable[[Any], Any]
TURNS: dict[str, Turn] = {
    "same": lambda a: a,
    "first": lambda a: a[0],
    "second": lambda a: a[1],
    "T": lambda a: a.T,
    "[heads, in, dim]": lambda a: a.transpose(0, 2, 1).reshape(-1, a.shape[1]),
    "first [heads, in, dim]": lambda a: a[0].transpose(0, 2, 1).reshape(-1, a.shape[2]),
    "second [heads, in, dim]": lambda a: a[1].transpose(0, 2, 1).reshape(-1, a.shape[2]),
    "[heads, dim, out]": lambda a: a.reshape(-1, a.shape[2]).T,
    "[in, heads, dim]": lambda a: a.reshape(a.shape[0], -1).T,
    "flat": lambda a: a.reshape(-1),
    "[height, width, in, out]": lambda a: a.transpose(3, 2, 0, 1),
}
LINEARS = {
    "attn/q_einsum": (("self_attn.q_proj", "[heads, in, dim]"),),
    "attn/kv_einsum": (
        ("self_attn.k_proj", "first [heads, in, dim]"),
        ("self_attn.v_proj", "second [heads, in, dim]"),
    ),
    "attn/attn_vec_einsum": (("self_attn.o_proj", "[heads, dim, out]"),),
    "mlp/gating_einsum": (("mlp.gate_proj", "first"), ("mlp.up_proj", "second")),
    "mlp/linear": (("mlp.down_proj", "T"),),
}
NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn/_query_norm": "self_attn.q_norm",
    "attn/_key_norm": "self_attn.k_norm",
}
OUTSIDE = {
    "embedder/input_embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "embedder/mm_input_projection": "multi_modal_projector.mm_input_projection_weight",
    "embedder/mm_soft_embedding_norm/scale": "multi_modal_projector.mm_soft_emb_norm.weight",
}
# Of the vision tower: weight's turn, bias's turn.
TOWER = {
    "MultiHeadDotProductAttention_0/query": ("self_attn.q_proj", "[in, heads, dim]", "flat"),
    "MultiHeadDotProductAttention_0/key": ("self_attn.k_proj", "[in, heads, dim]", "flat"),
    "MultiHeadDotProductAttention_0/value": ("self_attn.v_proj", "[in, heads, dim]", "flat"),
    "MultiHeadDotProductAttention_0/out": ("self_attn.out_proj", "[heads, dim, out]", "same"),
    "MlpBlock_0/Dense_0": ("mlp.fc1", "T", "same"),
    "MlpBlock_0/Dense_1": ("mlp.fc2", "T", "same"),
    "LayerNorm_0": ("layer_norm1", "same", "same"),
    "LayerNorm_1": ("layer_norm2", "same", "same"),
}


@dataclass(frozen=True, slots=True)
class FlaxWeight:
    """A tensor of the dense model; the rows behind the array's own, of an embedding table, are zeros."""

    array: str
    turn: str
    shape: tuple[int, ...]
    source: FlaxOriginal

    @property
    def grain(self) -> str:
        return self.source.read(self.array)[1]

    def rows(self, start: int, stop: int) -> Float32:
        values = TURNS[self.turn](self.source.read(self.array)[0])[start:stop]
        missing = min(stop, self.shape[0]) - start - len(values)
        padding = [(0, missing)] + [(0, 0)] * (values.ndim - 1)
        return np.ascontiguousarray(np.pad(values, padding) if missing > 0 else values)


@dataclass(slots=True)
class FlaxOriginal:
    """The arrays of an orbax folder by name, opened; the last one that was read is kept."""

    arrays: Mapping[str, Any]
    where: str
    _last: tuple[str, Float32, str] = field(default=("", np.zeros(0, np.float32), ""))

    def read(self, name: str) -> tuple[Float32, str]:
        """An array as float32, and the dtype that all of its numbers have."""
        if self._last[0] != name:
            try:
                stored = self.arrays[name].read().result()
            except (ValueError, OSError, NotImplementedError) as e:
                raise CheckpointError(
                    f"{name} cannot be read: {e}", where=self.where, remedy="Download the source again."
                ) from None
            values = np.ascontiguousarray(stored.astype(np.float32))
            self._last = (name, values, "BF16" if np.array_equal(rounded(values, "BF16"), values) else "F32")
        return self._last[1], self._last[2]

    def contents(self, rows: int) -> Contents:
        """All tensors of the dense model, with this many rows in the embedding table."""
        sees = any(n.startswith("tower/") for n in self.arrays)
        linears: dict[str, Weight] = {}
        others: dict[str, Weight] = {}
        for array, stored in self.arrays.items():
            for name, turn in _held(array, self.where):
                name = f"language_model.{name}" if sees and name.startswith("model.") else name
                shape = TURNS[turn](np.broadcast_to(np.int8(0), stored.shape)).shape
                if array == "embedder/input_embedding":
                    shape = (max(rows, shape[0]), *shape[1:])
                into = linears if array.partition("/")[2] in LINEARS else others
                into[name] = FlaxWeight(array, turn, tuple(shape), self)
        return Contents(linears, {}, given=others)


def is_flax_source(path: Path) -> bool:
    """Whether a folder is an orbax checkpoint, or has one in it and no config of its own."""
    return path.is_dir() and not (path / "config.json").exists() and bool(_orbax_folders(path))


def _orbax_folders(path: Path) -> list[Path]:
    folders = [path, *(p for p in sorted(path.iterdir()) if p.is_dir())]
    found = [p for p in folders if (p / METADATA).exists() or (p / MANIFEST).exists()]
    return found[:1] if path in found else found


def read_flax(path: Path) -> FlaxOriginal:
    """Open all arrays of an orbax folder, or of the one in a folder.

    Raises:
        CheckpointError: there are several, or tensorstore cannot read it.
        MissingDependencyError: tensorstore is not installed.
    """
    try:
        import tensorstore
    except ImportError:
        raise MissingDependencyError(
            "reading orbax checkpoints needs tensorstore", remedy="Install it with: pip install 'halfbyte[flax]'."
        ) from None
    folders = _orbax_folders(path)
    if len(folders) > 1:
        names = ", ".join(p.name for p in folders)
        raise CheckpointError(f"holds several orbax checkpoints: {names}", where=str(path), remedy="Name one of them.")
    files = {"driver": "file", "path": f"{folders[0].resolve()}/"}
    database = (folders[0] / MANIFEST).exists()
    arrays: dict[str, Any] = {}
    try:
        whole = {"driver": "ocdbt", "base": files} if database else files
        keys = [bytes(k).decode() for k in tensorstore.KvStore.open(whole).result().list().result()]
        trained = any(k.startswith("params") for k in keys)
        for key in sorted(keys):
            folder, _, leaf = key.rpartition("/")
            if leaf not in DRIVERS or not folder or (trained and not folder.startswith("params")):
                continue
            place = whole | {"path": f"{'' if database else files['path']}{folder}/"}
            arrays[_short(folder)] = tensorstore.open({"driver": DRIVERS[leaf], "kvstore": place}, open=True).result()
    except (ValueError, OSError, NotImplementedError, UnicodeDecodeError) as e:
        raise CheckpointError(
            f"cannot be read: {e}", where=str(folders[0]), remedy="Download the source again."
        ) from None
    return FlaxOriginal(arrays, str(folders[0]))


def _short(key: str) -> str:
    """``layer_0/attn/q_einsum`` or ``tower/...``, whichever tree the array was saved from."""
    name = key.replace(".", "/").removeprefix("params/").removeprefix("rlx_networks/policy_network/")
    name = name.removeprefix("transformer/").removesuffix("/w")
    return re.sub(r"^(SigLiPFromPatches_0|vision_encoder)/siglip_encoder/", "tower/", name)


def _held(array: str, where: str) -> Iterator[tuple[str, str]]:
    """The dense tensors that an array holds, and how each comes out of it."""
    if array in LEFT_BEHIND:
        return
    if array in OUTSIDE:
        yield OUTSIDE[array], "same"
        return
    if layer := re.fullmatch(r"layer_(\d+)/(.+)", array):
        block, part = f"model.layers.{layer[1]}", layer[2]
        norm = NORMS.get(part.removesuffix("/scale"))
        if norm is not None:
            yield f"{block}.{norm}.weight", "same"
            return
        if part in LINEARS:
            yield from ((f"{block}.{name}.weight", turn) for name, turn in LINEARS[part])
            return
    tower, leaf = "vision_tower.vision_model", array.rpartition("/")[2]
    ending = "bias" if leaf == "bias" else "weight"
    if array == "tower/pos_embedding":
        yield f"{tower}.embeddings.position_embedding.weight", "first"
        return
    if array.startswith("tower/embedding/"):
        turn = "same" if leaf == "bias" else "[height, width, in, out]"
        yield f"{tower}.embeddings.patch_embedding.{ending}", turn
        return
    if array.startswith("tower/Transformer/encoder_norm/"):
        yield f"{tower}.post_layernorm.{ending}", "same"
        return
    match = re.fullmatch(r"tower/Transformer/encoderblock_(\d+)/(.+)/(kernel|bias|scale)", array)
    if match is None or match[2] not in TOWER:
        raise CheckpointError(
            f"holds {array}, which Gemma 3 does not have", where=where, remedy="Give the source that was converted."
        )
    name, weight, bias = TOWER[match[2]]
    yield f"{tower}.encoder.layers.{match[1]}.{name}.{ending}", bias if leaf == "bias" else weight
