"""Where each tensor of a Hugging Face Gemma 3 lies in a Flax checkpoint, as a table of names, shapes and turns.

Flax' einsums keep heads apart and put inputs before outputs; Linears are ``[out, in]``. Norms need nothing: both sides
multiply by one plus the weight. Names are those of the checkpoints that Google publishes for Hugging Face, which every
version of transformers, vLLM and llama.cpp reads.

Source: FORMATS of the checkpoints themselves, and ``convert_gemma3_weights_orbax_to_hf.py`` in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from halfbyte.conversion.gemma3 import Shape, TowerShape
from halfbyte.conversion.orbax import ArrayInfo
from halfbyte.errors import CheckpointError, HalfbyteError, raise_all

TEXT, TOWER = "transformer", "SigLiPFromPatches_0/siglip_encoder"
# Written by some trainers, read by no published model.
LEFT_BEHIND = ("mm_output_embedding", "mm_input_embedding_extra")

Turn = Callable[[torch.Tensor], torch.Tensor]

# From what is stored to the dense tensor. For each: what comes in, what goes out.
TURNS: dict[str, Turn] = {
    "as is": lambda t: t,
    "transpose": lambda t: t.T,
    "heads out": lambda t: t.transpose(1, 2).flatten(0, 1),  # [heads, in, dim] -> [heads * dim, in]
    "heads in": lambda t: t.flatten(0, 1).T,  # [heads, dim, out] -> [out, heads * dim]
    "tower heads out": lambda t: t.flatten(1, 2).T,  # [in, heads, dim] -> [heads * dim, in]
    "flatten": lambda t: t.flatten(),  # [heads, dim] -> [heads * dim]
    "squeeze": lambda t: t[0],  # [1, positions, width] -> [positions, width]
    "kernel": lambda t: t.permute(3, 2, 0, 1),  # height, width, in, out -> out, in, height, width
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor of the dense model.

    Attributes:
        name: its dense name.
        array: the array that holds it; ``stored`` its shape.
        part: which entry of the array's first axis, where two tensors share one.
        turn: a name of :data:`TURNS`, done to that part.
        shape: of the dense tensor.
        linear: whether it is on the int4 grid: the decoder's Linears.
    """

    name: str
    array: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    turn: str = "as is"
    part: int | None = None
    linear: bool = False

    def cut(self, array: torch.Tensor) -> torch.Tensor:
        """The dense tensor out of its array; may share memory with it."""
        return TURNS[self.turn](array if self.part is None else array[self.part])


def canonical(names: Mapping[str, ArrayInfo]) -> dict[str, ArrayInfo]:
    """Arrays by the names of Kaggle's checkpoints, from those or from the trees that today's Flax code saves.

    ``layer_0/...`` and ``vision_encoder/...`` become ``transformer/layer_0/...`` and ``SigLiPFromPatches_0/...``; a
    training state gives its ``params``; the ``w`` at the end of some names is left out.
    """
    trained = any(n.startswith("params/") for n in names)
    found: dict[str, ArrayInfo] = {}
    for name, info in names.items():
        if trained and not name.startswith("params/"):
            continue
        short = name.removeprefix("params/").removeprefix("rlx_networks/policy_network/").removesuffix("/w")
        top = short.split("/")[0]
        if top == "vision_encoder":
            short = short.replace("vision_encoder", "SigLiPFromPatches_0", 1)
        elif top in ("embedder", "final_norm") or top.startswith("layer_"):
            short = f"{TEXT}/{short}"
        found[short] = info
    return found


def shape_of(arrays: Mapping[str, ArrayInfo], where: str) -> tuple[Shape, TowerShape | None]:
    """Read the model's measures off a few arrays.

    Raises:
        CheckpointError: these are missing or have other ranks: not a Gemma 3.
    """

    def dims(name: str, rank: int) -> tuple[int, ...]:
        info = arrays.get(name)
        if info is None:
            near = ", ".join(sorted(arrays)[:3])
            stacked = any("stacked" in n for n in arrays)
            why = (
                "its layers are stacked into one array each" if stacked else f"it holds {len(arrays)} arrays: {near}..."
            )
            raise CheckpointError(
                f"is no Flax checkpoint of Gemma 3: there is no {name}",
                where=where,
                why=why,
                remedy="Convert reads the checkpoints that Kaggle and google-deepmind/gemma publish.",
            )
        if len(info.shape) != rank:
            raise CheckpointError(f"{name} has shape {list(info.shape)}, not {rank} axes", where=where)
        return info.shape

    vocab, hidden = dims(f"{TEXT}/embedder/input_embedding", 2)
    heads, _, head_dim = dims(f"{TEXT}/layer_0/attn/q_einsum", 3)
    _, kv_heads, _, _ = dims(f"{TEXT}/layer_0/attn/kv_einsum", 4)
    _, ffw, _ = dims(f"{TEXT}/layer_0/mlp/gating_einsum", 3)
    layers = _count(arrays, f"{TEXT}/layer_")
    text = Shape(layers=layers, hidden=hidden, ffw=ffw, heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab=vocab)
    if not any(n.startswith(f"{TOWER}/") for n in arrays):
        return text, None
    block = f"{TOWER}/Transformer/encoderblock_"
    patch, _, _, width = dims(f"{TOWER}/embedding/kernel", 4)
    tower = TowerShape(
        layers=_count(arrays, block),
        hidden=width,
        ffw=dims(f"{block}0/MlpBlock_0/Dense_0/kernel", 2)[1],
        heads=dims(f"{block}0/MultiHeadDotProductAttention_0/query/kernel", 3)[1],
        patch=patch,
        positions=dims(f"{TOWER}/pos_embedding", 3)[1],
    )
    return text, tower


def _count(arrays: Mapping[str, ArrayInfo], prefix: str) -> int:
    numbers = {n.removeprefix(prefix).split("/")[0] for n in arrays if n.startswith(prefix)}
    return 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)


def layout(text: Shape, tower: TowerShape | None, rows: int) -> Iterator[Piece]:
    """Every tensor of the dense model, in the order of its layers.

    Args:
        text, tower: the model's measures.
        rows: of the dense embedding table; those behind the vocabulary are zeros.
    """
    prefix = "" if tower is None else "language_model."
    hidden = text.hidden
    yield Piece(
        name=f"{prefix}model.embed_tokens.weight",
        array=f"{TEXT}/embedder/input_embedding",
        stored=(text.vocab, hidden),
        shape=(rows, hidden),
    )
    for i in range(text.layers):
        yield from _layer(text, f"{prefix}model.layers.{i}", f"{TEXT}/layer_{i}")
    yield _vector(f"{prefix}model.norm.weight", f"{TEXT}/final_norm/scale", hidden)
    if tower is not None:
        yield from _tower(tower)
        yield Piece(
            name="multi_modal_projector.mm_input_projection_weight",
            array=f"{TEXT}/embedder/mm_input_projection",
            stored=(tower.hidden, hidden),
            shape=(tower.hidden, hidden),
        )
        yield _vector(
            "multi_modal_projector.mm_soft_emb_norm.weight",
            f"{TEXT}/embedder/mm_soft_embedding_norm/scale",
            tower.hidden,
        )


def _vector(name: str, array: str, size: int) -> Piece:
    return Piece(name=name, array=array, stored=(size,), shape=(size,))


def _layer(text: Shape, ours: str, theirs: str) -> Iterator[Piece]:
    hidden, ffw, heads, kv, dim = text.hidden, text.ffw, text.heads, text.kv_heads, text.head_dim

    def linear(
        name: str, array: str, stored: tuple[int, ...], shape: tuple[int, int], turn: str, part: int | None
    ) -> Piece:
        return Piece(
            name=f"{ours}.{name}.weight",
            array=f"{theirs}/{array}",
            stored=stored,
            shape=shape,
            turn=turn,
            part=part,
            linear=True,
        )

    for norm, array in (
        ("input_layernorm", "pre_attention_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "pre_ffw_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ):
        yield _vector(f"{ours}.{norm}.weight", f"{theirs}/{array}/scale", hidden)
    yield _vector(f"{ours}.self_attn.q_norm.weight", f"{theirs}/attn/_query_norm/scale", dim)
    yield _vector(f"{ours}.self_attn.k_norm.weight", f"{theirs}/attn/_key_norm/scale", dim)
    q, kv_pair, o = (heads, hidden, dim), (2, kv, hidden, dim), (heads, dim, hidden)
    yield linear("self_attn.q_proj", "attn/q_einsum", q, (heads * dim, hidden), "heads out", None)
    yield linear("self_attn.k_proj", "attn/kv_einsum", kv_pair, (kv * dim, hidden), "heads out", 0)
    yield linear("self_attn.v_proj", "attn/kv_einsum", kv_pair, (kv * dim, hidden), "heads out", 1)
    yield linear("self_attn.o_proj", "attn/attn_vec_einsum", o, (hidden, heads * dim), "heads in", None)
    yield linear("mlp.gate_proj", "mlp/gating_einsum", (2, ffw, hidden), (ffw, hidden), "as is", 0)
    yield linear("mlp.up_proj", "mlp/gating_einsum", (2, ffw, hidden), (ffw, hidden), "as is", 1)
    yield linear("mlp.down_proj", "mlp/linear", (ffw, hidden), (hidden, ffw), "transpose", None)


def _tower(tower: TowerShape) -> Iterator[Piece]:
    ours, width, dim = "vision_tower.vision_model", tower.hidden, tower.hidden // tower.heads

    def pair(name: str, array: str, stored: tuple[int, ...], shape: tuple[int, ...], turn: str) -> Iterator[Piece]:
        """A weight and its bias, which has a value for each output."""
        yield Piece(
            name=f"{ours}.{name}.weight", array=f"{TOWER}/{array}/kernel", stored=stored, shape=shape, turn=turn
        )
        many = turn == "tower heads out"
        yield Piece(
            name=f"{ours}.{name}.bias",
            array=f"{TOWER}/{array}/bias",
            stored=stored[1:] if many else (shape[0],),
            shape=(shape[0],),
            turn="flatten" if many else "as is",
        )

    def norm(name: str, array: str) -> Iterator[Piece]:
        yield _vector(f"{ours}.{name}.weight", f"{TOWER}/{array}/scale", width)
        yield _vector(f"{ours}.{name}.bias", f"{TOWER}/{array}/bias", width)

    pixels = (tower.patch, tower.patch, 3, width)
    yield from pair("embeddings.patch_embedding", "embedding", pixels, (width, 3, tower.patch, tower.patch), "kernel")
    yield Piece(
        name=f"{ours}.embeddings.position_embedding.weight",
        array=f"{TOWER}/pos_embedding",
        stored=(1, tower.positions, width),
        shape=(tower.positions, width),
        turn="squeeze",
    )
    for i in range(tower.layers):
        block, layer = f"Transformer/encoderblock_{i}", f"encoder.layers.{i}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        yield from norm(f"{layer}.layer_norm1", f"{block}/LayerNorm_0")
        yield from norm(f"{layer}.layer_norm2", f"{block}/LayerNorm_1")
        for name, array in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            heads = (width, tower.heads, dim)
            yield from pair(
                f"{layer}.self_attn.{name}", f"{attention}/{array}", heads, (width, width), "tower heads out"
            )
        merged = (tower.heads, dim, width)
        yield from pair(f"{layer}.self_attn.out_proj", f"{attention}/out", merged, (width, width), "heads in")
        up, down = (width, tower.ffw), (tower.ffw, width)
        yield from pair(f"{layer}.mlp.fc1", f"{block}/MlpBlock_0/Dense_0", up, (tower.ffw, width), "transpose")
        yield from pair(f"{layer}.mlp.fc2", f"{block}/MlpBlock_0/Dense_1", down, (width, tower.ffw), "transpose")
    yield from norm("post_layernorm", "Transformer/encoder_norm")


def check(pieces: Mapping[str, Piece], arrays: Mapping[str, ArrayInfo], where: str) -> list[str]:
    """Hold the table against what is there.

    Returns:
        Arrays that are left behind, which is no fault.

    Raises:
        CheckpointError: arrays are missing, have other shapes or dtypes, or are not known; the first ten are named.
    """
    wanted = {p.array: p for p in pieces.values()}
    problems: list[HalfbyteError] = []
    for name, piece in wanted.items():
        info = arrays.get(name)
        if info is None:
            problems.append(CheckpointError(f"{name} is missing", where=where, remedy="Download it again."))
        elif info.shape != piece.stored:
            problems.append(
                CheckpointError(f"{name} has shape {list(info.shape)}, not {list(piece.stored)}", where=where)
            )
        elif info.dtype not in ("BF16", "F32"):
            problems.append(CheckpointError(f"{name} is neither bfloat16 nor float32", where=where))
    others = [n for n in arrays if n not in wanted]
    left = [n for n in others if n.rpartition("/")[2] in LEFT_BEHIND]
    unknown = [n for n in others if n not in left]
    if unknown and not problems:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        problems.append(
            CheckpointError(
                f"holds arrays that Gemma 3 does not have: {', '.join(unknown[:3])}{more}",
                where=where,
                remedy="Adapters and other models cannot be converted.",
            )
        )
    raise_all(problems[:10])
    return left
