"""GGUF as a target: ``model.gguf`` for llama.cpp, ``mmproj.gguf`` beside it where the model sees pictures.

Codes and scales are copied into blocks (:mod:`halfbyte.conversion.gguf_blocks`); rows of q and k are reordered where
llama.cpp wants it, codes with their scales. Norms, biases and other vectors are float32, dense matrices (embeddings,
head, what was not quantised) stay as they are or become float16 or bfloat16. What a block cannot hold exactly is said
beforehand.

Besides what llama.cpp reads, the metadata keep under ``halfbyte.`` what a way back needs and llama.cpp does not
(:mod:`halfbyte.conversion.gguf_return`). Does not cover: float8 weights, input features that are not a multiple of 32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from halfbyte.checkpoint.reader import TEMPLATES_FOLDER, companion_name
from halfbyte.conversion.coded import FLOATS, CodedWeight, Grid
from halfbyte.conversion.folder_target import write_companions
from halfbyte.conversion.gguf_blocks import BLOCK, BlockType, block_type, encode, from_words, has_words
from halfbyte.conversion.gguf_families import (
    ROPE_KEY,
    Family,
    Metadata,
    context_length,
    expert_count,
    family_of,
    family_problems,
    is_norm,
    model_metadata,
    permute,
    rope_factors,
    supported,
    text_name,
    turned_heads,
)
from halfbyte.conversion.gguf_file import GgufFiles, GgufSpec, Planned
from halfbyte.conversion.gguf_return import BREAK_EMBEDDING, TENSORS_KEY, Noted, lost_by_adding, write_notes
from halfbyte.conversion.gguf_tokenizer_out import WrittenTokenizer, read_tokenizer_files, tokenizer_metadata
from halfbyte.conversion.gguf_vision import FLOAT32, NORM_OFFSETS, Vision, vision_of
from halfbyte.conversion.source import Entry, Source
from halfbyte.conversion.target import Facts, Obstacle
from halfbyte.records import parse_object
from halfbyte.schemes import WeightFormat

MODEL_NAME, VISION_NAME = "model.gguf", "mmproj.gguf"
# general.file_type, llama.cpp's LLAMA_FTYPE, by the type of most weights
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
_LEFT_BEHIND = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an entry goes.

    Attributes:
        name: of the GGUF tensor; expert: its part of it, if it is a stack.
        heads: in which rows are reordered, 0 for none.
        vision: whether it is in the projector's file.
    """

    name: str
    expert: int | None = None
    heads: int = 0
    vision: bool = False

    @property
    def written(self) -> str:
        """The name that :class:`GgufFiles` takes."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


@dataclass(slots=True)
class _Model:
    """What a source's config and tokenizer become."""

    config: Any
    family: Family
    vision: Vision | None
    places: dict[str, _Place]
    blind: bool
    skipped: list[str]
    unknown: list[str]
    tokenizer: WrittenTokenizer


@dataclass(slots=True)
class GgufTarget:
    """A :class:`~halfbyte.conversion.target.Target` that writes GGUF.

    Attributes:
        dtype: of dense matrices: "F16", "BF16", "F32", or ``None`` for what they have.
    """

    dtype: str | None = None
    _models: dict[int, _Model] = field(default_factory=dict)
    _kinds: dict[str, str] = field(default_factory=dict)
    _inexact: set[str] = field(default_factory=set)

    @property
    def format(self) -> str:
        return "gguf"

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        config = _read_config(source.config)
        if config is None:
            shown = source.config.get("model_type", "(none)")
            return [Obstacle(name="", reason=f"transformers knows no model_type {shown}")]
        text = config.get_text_config()
        family = family_of(text.model_type)
        if family is None:
            return [
                Obstacle(
                    name="",
                    reason=f"halfbyte cannot write model_type {text.model_type} for llama.cpp",
                    remedy=f"Types that it can: {supported()}.",
                )
            ]
        model = self._model(source)
        found = [Obstacle(name="", reason=f"config.json: {p}") for p in family_problems(model.config, family)]
        found += [Obstacle(name="", reason=p) for p in model.tokenizer.problems]
        found += [Obstacle(name=n, reason="llama.cpp has no place for it in this architecture") for n in model.unknown]
        for name, place in model.places.items():
            entry = source.entries[name]
            if entry.grid is not None:
                obstacle = _block_problem(entry, entry.grid, facts[name], vision=place.vision)
                if obstacle is not None:
                    found.append(obstacle)
                    self._inexact.add(name)
        return found

    def entries(self, source: Source, facts: Mapping[str, Facts]) -> list[Entry]:
        model = self._model(source)
        kept = []
        for name, entry in source.entries.items():
            place = model.places.get(name)
            if place is None:
                continue
            if entry.grid is not None:
                entry = replace(entry, grid=replace(entry.grid, scale_dtype="F16"))
            elif len(entry.shape) == 1 or _only_float32(place.name) or entry.dtype not in FLOATS:
                entry = replace(entry, dtype="F32")
            elif self.dtype is not None:
                entry = replace(entry, dtype=self.dtype)
            kept.append(entry)
        return kept

    def files(self, source: Source, entries: Sequence[Entry], max_shard_bytes: int) -> GgufFiles:
        model = self._model(source)
        self._settle_kinds(source, entries, model)
        specs: dict[str, GgufSpec] = {}
        for entry in entries:
            place = model.places[entry.name]
            shape = entry.shape
            if place.expert is not None:
                shape = (expert_count(model.config), *shape)
            specs[place.name] = GgufSpec(name=place.name, kind=self._kinds[place.name], shape=shape)
        seen = {model.places[e.name].name for e in entries if model.places[e.name].vision}
        text = [s for n, s in specs.items() if n not in seen]
        constants: dict[str, torch.Tensor] = {}
        factors = rope_factors(model.config)
        if factors is not None:
            constants["rope_freqs.weight"] = factors
            text.append(GgufSpec(name="rope_freqs.weight", kind="F32", shape=tuple(factors.shape)))
        planned = [
            Planned(
                file=MODEL_NAME,
                architecture=model.family.architecture,
                metadata=self._metadata(source, entries, model),
                tensors=text,
                constants=constants,
            )
        ]
        if seen:
            planned.append(self._vision_file(source, model, [s for n, s in specs.items() if n in seen]))
        return GgufFiles(planned)

    def _vision_file(self, source: Source, model: _Model, specs: list[GgufSpec]) -> Planned:
        assert model.vision is not None
        constants: dict[str, torch.Tensor] = {}
        if model.vision.break_token is not None:
            table = next(n for n, p in model.places.items() if p.name == "token_embd.weight")
            row = source.dense(table)[model.vision.break_token].to(torch.float32).clone()
            constants[BREAK_EMBEDDING] = row
            specs.append(GgufSpec(name=BREAK_EMBEDDING, kind="F32", shape=tuple(row.shape)))
        return Planned(
            file=VISION_NAME,
            architecture="clip",
            metadata={"general.type": ("mmproj", "STRING"), **_name(source), **model.vision.metadata},
            tensors=specs,
            constants=constants,
        )

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        place = self._places()[entry.name]
        kind: Any = self._kinds[place.name]
        scales, zeros = weight.steps.scales, weight.steps.zero_points
        packed = has_words(kind, weight.grid.weights.num_bits)
        codes = weight.words if packed else weight.codes()
        if place.heads:
            codes, scales = permute(codes, place.heads), permute(scales, place.heads)
            zeros = None if zeros is None else permute(zeros, place.heads)
        return {place.written: (from_words if packed else encode)(kind, codes.contiguous(), scales, zeros)}

    def keep(self, entry: Entry, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        model = next(iter(self._models.values()))
        place = model.places[entry.name]
        if place.vision:
            assert model.vision is not None
            tensor = model.vision.changed(place.name, tensor)
        elif offset := _added(place, model):
            tensor = tensor + offset
        elif place.heads:
            tensor = permute(tensor, place.heads)
        return {place.written: tensor.contiguous()}

    def finish(self, folder: Any, source: Source, entries: Sequence[Entry]) -> None:
        write_companions(folder, source, source.config)

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        model = self._model(source)
        notes = list(model.tokenizer.notes)
        limit = context_length(model.config, model.family)
        if limit < model.config.max_position_embeddings:
            notes.append(
                f"llama.cpp has no sliding window for this architecture: context_length is {limit}, within which "
                "nothing differs"
            )
        if model.blind:
            notes.append(
                "the vision tower is left out: halfbyte does not write its kind for llama.cpp, so it sees text alone"
            )
        elif model.skipped:
            notes.append(f"left behind: {', '.join(model.skipped[:3])}{' ...' if len(model.skipped) > 3 else ''}")
        return notes

    def _places(self) -> dict[str, _Place]:
        return next(iter(self._models.values())).places

    def _model(self, source: Source) -> _Model:
        """What the source becomes; worked out once."""
        if id(source) not in self._models:
            self._models = {id(source): _model_of(source)}
        return self._models[id(source)]

    def _settle_kinds(self, source: Source, entries: Sequence[Entry], model: _Model) -> None:
        """ggml's type of every tensor; a stack has that of its most demanding expert."""
        order = ["Q4_0", "Q4_1", "Q5_0", "Q8_0"]
        for entry in entries:
            name = model.places[entry.name].name
            if entry.grid is None:
                self._kinds[name] = entry.dtype
                continue
            kind = _kind(source, entry, entry.grid)
            held = self._kinds.get(name, kind)
            self._kinds[name] = max(kind, held, key=order.index)

    def _metadata(self, source: Source, entries: Sequence[Entry], model: _Model) -> Metadata:
        counts: dict[str, int] = {}
        for entry in entries:
            place = model.places[entry.name]
            kind = self._kinds[place.name]
            counts[kind] = counts.get(kind, 0) + (len(entry.shape) > 1 and not place.vision)
        values: Metadata = {
            "general.type": ("model", "STRING"),
            **_name(source),
            "general.file_type": (_FILE_TYPES[max(counts, key=lambda k: counts[k])], "UINT32"),
            **model_metadata(model.config, model.family),
            **model.tokenizer.metadata,
        }
        if any(e.grid is not None for e in entries):
            values["general.quantization_version"] = (2, "UINT32")
        if rope_factors(model.config) is not None:
            values[ROPE_KEY] = (json.dumps(dict(model.config.rope_parameters), sort_keys=True), "STRING")
        values[TENSORS_KEY] = (write_notes([self._noted(source, e, model) for e in entries]), "STRING")
        return values

    def _noted(self, source: Source, entry: Entry, model: _Model) -> Noted:
        place, held = model.places[entry.name], source.entries[entry.name]
        grid: Grid | None = None
        exact: tuple[tuple[int, float], ...] = ()
        if entry.grid is not None:
            found = entry.grid if held.grid is None or entry.name in self._inexact else held.grid
            grid = replace(entry.grid, scale_dtype=found.scale_dtype, activations=found.activations)
        elif offset := _added(place, model):
            exact = lost_by_adding(source.dense(entry.name), offset)
        return Noted(
            name=entry.name,
            tensor=place.name,
            dtype=held.dtype,
            expert=place.expert,
            kind=None if grid is None else self._kinds[place.name],
            grid=grid,
            exact=exact,
        )


def _added(place: _Place, model: _Model) -> float:
    """What is added to a tensor's elements."""
    if place.vision:
        return NORM_OFFSETS.get(place.name, 0.0)
    return model.family.norm_offset if is_norm(place.name) else 0.0


def _only_float32(name: str) -> bool:
    """Whether llama.cpp takes a matrix (by its GGUF name) in float32 alone: routers, and some of the vision tower."""
    return ".ffn_gate_inp" in name or name in FLOAT32


def _read_config(config: Mapping[str, Any]) -> Any:
    """The config object of transformers, which fills defaults and reads older spellings; ``None`` for unknown types."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    return CONFIG_MAPPING[kind].from_dict(dict(config)) if kind in CONFIG_MAPPING else None


def _model_of(source: Source) -> _Model:
    outer = _read_config(source.config)
    config = outer.get_text_config()
    family = family_of(config.model_type)
    assert family is not None
    vision = vision_of(outer, _files(source)) if outer is not config else None
    places: dict[str, _Place] = {}
    skipped, unknown = [], []
    dense_names = _inverted(family)
    for name in source.entries:
        plain = text_name(name)
        place = _place(plain, dense_names, family, config)
        in_tower = vision.place(name) if vision is not None and place is None else None
        if plain == "lm_head.weight" and config.tie_word_embeddings:
            skipped.append(name)
        elif place is not None:
            places[name] = place
        elif in_tower is not None:
            places[name] = _Place(name=in_tower, vision=True)
        elif _LEFT_BEHIND.search(name) or (outer is not config and not plain.startswith(("model.layers", "lm_head"))):
            skipped.append(name)
        else:
            unknown.append(name)
    return _Model(
        config=config,
        family=family,
        vision=vision,
        places=places,
        blind=outer is not config and vision is None,
        skipped=skipped,
        unknown=unknown,
        tokenizer=_tokenizer(source, config),
    )


def _inverted(family: Family) -> dict[str, str]:
    """Dense stem -> GGUF stem, layers and experts as ``{}`` and ``{e}``."""
    return {dense: gguf for gguf, dense in family.names.items()}


def _place(name: str, stems: Mapping[str, str], family: Family, config: Any) -> _Place | None:
    """Where a tensor of the language model goes, by its plain dense name."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    layer = expert = None
    if match := re.match(r"model\.layers\.(\d+)\.(.*)", stem):
        layer, stem = int(match[1]), f"model.layers.{{}}.{match[2]}"
        if layer >= config.num_hidden_layers:
            return None
    if match := re.match(r"(.*\.experts\.)(\d+)(\..*)", stem):
        expert, stem = int(match[2]), f"{match[1]}{{e}}{match[3]}"
    if stem not in stems:
        return None
    written = stems[stem].replace("{}", str(layer))
    heads = turned_heads(family, f"{written}.{leaf}", config.num_attention_heads, config.num_key_value_heads)
    return _Place(name=f"{written}.{leaf}", expert=expert, heads=heads)


def _files(source: Source) -> dict[str, bytes]:
    """Contents of the companions that describe tokenizer, generation and pictures."""
    wanted = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
    }
    named = {companion_name(p): p for p in source.companions}
    found = {n: p.read_bytes() for n, p in named.items() if n in wanted or n.startswith(f"{TEMPLATES_FOLDER}/")}
    return found | {n: c for n, c in source.extra_files.items() if n in wanted}


def _tokenizer(source: Source, config: Any) -> WrittenTokenizer:
    files = _files(source)
    found = read_tokenizer_files(files)
    if found is None:
        return WrittenTokenizer(
            problems=["there is no tokenizer.json, and llama.cpp needs the tokenizer in the same file"]
        )
    generation = parse_object(files, "generation_config.json")
    ids = {k: source.config.get(k, getattr(config, k, None)) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    final = generation.get("eos_token_id", ids["eos_token_id"])
    finals = final if isinstance(final, list) else [] if final is None else [final]
    return tokenizer_metadata(found, config.vocab_size, ids | {k: v for k, v in generation.items() if k in ids}, finals)


def _kind(source: Source, entry: Entry, grid: Grid) -> BlockType:
    if grid.weights.symmetric:
        return "Q4_0" if grid.weights.num_bits <= 4 else "Q8_0"
    held = source.entries[entry.name].grid
    if held is None or held.weights != grid.weights:
        return "Q5_0"  # requantised: its zero points are not known yet
    steps = source.steps(entry.name)
    return block_type(grid.weights.num_bits, steps.scales.to(torch.float16), steps.zero_points) or "Q5_0"


def _block_problem(entry: Entry, grid: Grid, facts: Facts, *, vision: bool) -> Obstacle | None:
    """Why blocks cannot hold an entry exactly, and the nearest that they can."""
    w = grid.weights
    if vision:
        reason = "it is part of a quantised vision tower, and halfbyte writes towers as floats"
        return Obstacle(name=entry.name, reason=reason, remedy="Convert it to dense first.")
    if w.kind == "float" or w.block is not None:
        return Obstacle(
            name=entry.name, reason="float8 weights have no type in GGUF", remedy="Convert it to dense first."
        )
    if entry.shape[1] % BLOCK:
        return Obstacle(
            name=entry.name,
            reason=f"in_features {entry.shape[1]} is not a multiple of {BLOCK}, the size of a block",
            remedy="Convert it to dense first.",
        )
    nearest = Grid(weights=WeightFormat(num_bits=4 if w.num_bits <= 4 else 8, group_size=BLOCK), scale_dtype="F16")
    if grid.ordered:
        return Obstacle(name=entry.name, reason="act-order groups (g_idx), which blocks do not have", grid=nearest)
    if w.group_size is not None and w.group_size % BLOCK:
        return Obstacle(
            name=entry.name, reason=f"groups of {w.group_size} are not whole blocks of {BLOCK}", grid=nearest
        )
    if not w.symmetric and w.num_bits > 4:
        return Obstacle(
            name=entry.name, reason=f"asymmetric int{w.num_bits} has no type in GGUF (Q8_0 is symmetric)", grid=nearest
        )
    if "F16" in facts.exact_in:
        return None
    same = replace(grid, scale_dtype="F16") if "F16" in facts.finite_in else nearest
    return Obstacle(name=entry.name, reason="scales that float16 does not hold exactly", grid=same)


def _name(source: Source) -> Metadata:
    name = str(source.config.get("_name_or_path") or source.name).rstrip("/").rsplit("/", 1)[-1]
    return {"general.name": (name, "STRING")} if name else {}
