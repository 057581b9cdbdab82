"""``convert --from flax``: checkpoints that orbax itself wrote, against the transformers models that they are."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import flax_checkpoints as flax
import halfbyte
import tiny
from halfbyte.conversion import gemma3
from halfbyte.conversion.flax_layout import layout
from halfbyte.conversion.flax_qat import open_flax
from halfbyte.conversion.run import convert
from halfbyte.errors import CheckpointError, HalfbyteError, MissingDependencyError, UsageError
from test_gemma3_tokenizer import sentencepiece_like_gemmas

pytestmark = pytest.mark.skipif(not flax.has_orbax, reason="needs orbax-checkpoint, jax and tensorstore")

KINDS = ("text bf16", "text f32", "pictures bf16", "pictures f32")


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint on disk and what it was made of."""

    made: flax.Made
    path: Path
    beside: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"config": self.beside, "tokenizer": self.beside}


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Case]:
    """All checkpoints, written in one process; not to be changed."""
    root = tmp_path_factory.mktemp("flax")
    made = {
        kind: flax.build(
            pictures=kind.startswith("pictures"), stored=torch.bfloat16 if kind.endswith("bf16") else torch.float32
        )
        for kind in KINDS
    }
    jobs = {kind: flax.Job(arrays=m.arrays, out=root / kind / "gemma-3-tiny-it-int4") for kind, m in made.items()}
    text = made["text bf16"].arrays
    variants = {
        "zarr3": flax.Job(arrays=text, out=root / "zarr3", zarr3=True),
        "folders": flax.Job(arrays=text, out=root / "folders", ocdbt=False),
        "folders f32": flax.Job(arrays=made["text f32"].arrays, out=root / "folders32", ocdbt=False),
        "folders zarr3": flax.Job(arrays=text, out=root / "folders3", ocdbt=False, zarr3=True),
        "nested": flax.Job(arrays=_as_saved_today(made["pictures bf16"].arrays), out=root / "nested", nested=True),
    }
    flax.write([*jobs.values(), *variants.values()], root)
    configs = {k: flax.save_config(m, root / f"config {k}") for k, m in made.items()}
    found = {k: Case(made[k], job.out, configs[k]) for k, job in jobs.items()}
    of = {"nested": "pictures bf16", "folders f32": "text f32"}
    return found | {
        k: Case(made[of.get(k, "text bf16")], job.out, configs[of.get(k, "text bf16")]) for k, job in variants.items()
    }


def _as_saved_today(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As google-deepmind/gemma's own trainer saves the same model: a nested tree inside a training state."""
    found = {"step": torch.zeros(1)}
    for name, array in arrays.items():
        short = name.removeprefix("transformer/").replace("SigLiPFromPatches_0", "vision_encoder")
        found[f"params/{short.removesuffix('/w') if '/mlp/' in short else short}"] = array
    return found


def loaded(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(8)
    ids = torch.randint(5, flax.VOCAB - 5, (2, 24))
    if not hasattr(model.config, "vision_config"):
        return {"input_ids": ids}
    ids[:, 3:7] = flax.VOCAB
    return {
        "input_ids": ids,
        "token_type_ids": (ids == flax.VOCAB).long(),
        "pixel_values": torch.randn(2, 3, 56, 56),
    }


@pytest.mark.parametrize("kind", [*KINDS, "nested"])
def test_dense_is_the_model_that_the_checkpoint_was_made_from(
    cases: Mapping[str, Case], kind: str, tmp_path: Path
) -> None:
    case = cases[kind]
    dtype = "float32" if kind.endswith("f32") else "bfloat16"
    record = convert(case.path, tmp_path / "dense", to="dense", dtype=dtype, **case.options)
    stored = tiny.stored(tmp_path / "dense")
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    assert record.source["format"] == "flax"
    model = loaded(tmp_path / "dense", dtype=torch.float32)
    theirs = model.state_dict()
    for name, tensor in case.made.model.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, case.made.model(**inputs).logits)
    if not kind.startswith("text"):
        embedding = stored["language_model.model.embed_tokens.weight"]
        assert embedding.shape[0] == flax.VOCAB + 64
        assert not embedding[flax.VOCAB :].any()
        assert "vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight" in stored


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_of_the_training(cases: Mapping[str, Case], kind: str) -> None:
    """But for common factors, and for which of several scales a bfloat16 rounding left to choose from."""
    case = cases[kind]
    source = open_flax(case.path, **case.options)
    linears = [e for e in source.entries.values() if e.grid is not None]
    assert len(linears) == len(case.made.grids) == 7 * 7
    for entry in linears:
        name = entry.name.replace("language_model.model.", "model.language_model.")
        codes, scales = case.made.grids[name]
        weight = source.coded(entry.name)
        assert torch.equal(weight.steps.scales, source.steps(entry.name).scales)
        found, found_scales = weight.codes().unflatten(1, (-1, 32)), weight.steps.scales
        factor = scales / found_scales
        plain = codes.unflatten(1, (-1, 32)).abs().amax(-1) == found.abs().amax(-1)
        assert plain.float().mean() > 0.99
        assert torch.equal(found[plain], codes.unflatten(1, (-1, 32))[plain])
        if kind.endswith("f32"):
            plain &= codes.unflatten(1, (-1, 32)).any(-1)
            assert bool((factor[plain] == 1).all())
            assert torch.equal(weight.dense(), case.made.model.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["compressed-tensors", "awq", "gptq"])
def test_quantised_targets_hold_the_weights_of_the_dense_copy(
    cases: Mapping[str, Case], kind: str, to: str, tmp_path: Path
) -> None:
    case = cases[kind]
    record = convert(case.path, tmp_path / "dense", to="dense", **case.options)
    assert record.quantized == 49
    record = convert(case.path, tmp_path / "small", to=to, **case.options)
    assert record.exact == record.quantized == 49
    assert not record.requantized
    again = convert(tmp_path / "small", tmp_path / "again", to="dense")
    assert again.quantized == 49
    first, second = tiny.stored(tmp_path / "dense"), tiny.stored(tmp_path / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name].to(tensor.dtype)), name
    model, inputs = loaded(tmp_path / "dense"), inputs_of(case.made.model)
    inputs |= {k: v.to(model.dtype) for k, v in inputs.items() if v.is_floating_point()}
    with torch.no_grad():
        expected = model(**inputs).logits
        if to == "compressed-tensors":
            config = transformers.CompressedTensorsConfig(dequantize=True)
            small = loaded(tmp_path / "small", quantization_config=config)
        else:
            small = loaded(tmp_path / "again")
        assert torch.equal(small(**inputs).logits, expected)


@pytest.mark.parametrize("variant", ["zarr3", "folders", "folders zarr3"])
def test_all_that_orbax_writes_is_read_alike(cases: Mapping[str, Case], variant: str, tmp_path: Path) -> None:
    first = convert(cases["text bf16"].path, tmp_path / "a", to="dense", **cases["text bf16"].options)
    second = convert(cases[variant].path, tmp_path / "b", to="dense", **cases[variant].options)
    assert first.sha256 == second.sha256
    assert first.source["sha256"] == second.source["sha256"]


def test_float32_that_is_not_quantised_is_rounded_and_said(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["text f32"]
    record = convert(case.path, tmp_path / "out", to="compressed-tensors", **case.options)
    assert any("rounded to bfloat16; --dtype float32 keeps them" in n for n in record.notes)
    kept = convert(case.path, tmp_path / "kept", to="compressed-tensors", dtype="float32", **case.options)
    assert not any("rounded" in n for n in kept.notes)
    wide, narrow = tiny.stored(tmp_path / "kept"), tiny.stored(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(wide[name], case.made.arrays["transformer/embedder/input_embedding"])
    assert torch.equal(wide[name].to(torch.bfloat16), narrow[name])
    packed = "model.layers.0.mlp.up_proj.weight_packed"
    assert torch.equal(wide[packed], narrow[packed])


# ---------------------------------------------------------------------------------------------------------- bad input


def rewritten(case: Case, folder: Path, array: str, change: Any) -> Path:
    """A copy of a checkpoint in folders, of which one array is changed in place."""
    import tensorstore

    out = folder / "gemma-3-tiny-it-int4"
    shutil.copytree(case.path, out)
    key = array.rpartition("/")
    place = {"driver": "file", "path": f"{out}/{key[0]}.{key[2]}/"}
    store = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True).result()
    read = store.read().result()
    wide = read.dtype.itemsize == 4
    value = torch.from_numpy(read if wide else read.view("int16"))
    change(value if wide else value.view(torch.bfloat16))
    store.write(value.numpy().view(store.dtype.numpy_dtype)).result()
    return out


def refused(case: Case, path: Path, tmp_path: Path, **options: Any) -> HalfbyteError:
    with pytest.raises(HalfbyteError) as caught:
        convert(path, tmp_path / "out", to="compressed-tensors", **(case.options | options))
    assert not list(tmp_path.glob("out*"))
    return caught.value


def test_a_value_off_the_grid_names_tensor_and_place(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders"]

    def change(w: torch.Tensor) -> None:
        w[1, 5, 70] *= 1.05  # up_proj's output 5, input 70

    path = rewritten(case, tmp_path / "in", "transformer/layer_4/mlp/gating_einsum/w", change)
    error = str(refused(case, path, tmp_path))
    assert "model.layers.4.mlp.up_proj.weight is not on an int4 grid: 1 of 480 groups of 32 inputs" in error
    assert "output 5, inputs 64 to 95" in error
    assert "transformer/layer_4/mlp/gating_einsum" in error
    assert "damaged" in error


def test_weights_beside_their_grid_need_permission(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders f32"]

    def change(w: torch.Tensor) -> None:
        w[2] = torch.nextafter(w[2], torch.tensor(torch.inf))

    path = rewritten(case, tmp_path / "in", "transformer/layer_0/attn/q_einsum/w", change)
    error = str(refused(case, path, tmp_path))
    assert "model.layers.0.self_attn.q_proj.weight is not on an int4 grid" in error
    assert "beside one by a few last places; --allow-requantize puts them onto it" in error
    convert(case.path, tmp_path / "straight", to="awq", **case.options)
    record = convert(path, tmp_path / "moved", to="awq", allow_requantize=True, **case.options)
    assert any(
        n.startswith("1 Linears lay beside their grids") and "layers.0.self_attn.q_proj" in n for n in record.notes
    )
    first, second = tiny.stored(tmp_path / "straight"), tiny.stored(tmp_path / "moved")
    assert all(torch.equal(t, second[n]) for n, t in first.items())


def test_a_checkpoint_that_was_not_trained_for_int4_is_told_apart(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders"]
    path = rewritten(case, tmp_path / "in", "transformer/layer_0/attn/q_einsum/w", lambda w: w.normal_())
    assert "int4 in their names" in str(refused(case, path, tmp_path))


def test_nan_and_zeros_are_refused(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders"]
    path = rewritten(case, tmp_path / "nan", "transformer/layer_2/mlp/linear/w", lambda w: w[7, 1].fill_(torch.nan))
    error = str(refused(case, path, tmp_path))
    assert "model.layers.2.mlp.down_proj.weight holds NaN or infinity (output 1, inputs 0 to 31)" in error
    path = rewritten(case, tmp_path / "zero", "transformer/layer_2/mlp/linear/w", lambda w: w.zero_())
    assert "model.layers.2.mlp.down_proj.weight holds nothing but zeros" in str(refused(case, path, tmp_path))


def test_a_lost_chunk_is_not_read_as_zeros(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders"]
    shutil.copytree(case.path, tmp_path / "in")
    (tmp_path / "in/transformer/layer_3/attn/kv_einsum.w/0.0.0.0").unlink()
    assert "lacks data of transformer/layer_3/attn/kv_einsum/w" in str(refused(case, tmp_path / "in", tmp_path))
    shutil.rmtree(tmp_path / "in/transformer/layer_3/attn/kv_einsum.w")
    assert "lacks data of transformer/layer_3/attn/kv_einsum/w" in str(refused(case, tmp_path / "in", tmp_path))
    (tmp_path / "in/_METADATA").unlink()  # which named it
    with pytest.raises(CheckpointError, match="no orbax checkpoint"):
        convert(tmp_path / "in", tmp_path / "out", to="dense", source_format="flax", **case.options)


@pytest.mark.parametrize("kind", ["text bf16", "zarr3"])
def test_truncated_databases_are_refused(cases: Mapping[str, Case], kind: str, tmp_path: Path) -> None:
    case = cases[kind]
    shutil.copytree(case.path, tmp_path / "in")
    largest = max((tmp_path / "in/ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in str(refused(case, tmp_path / "in", tmp_path))
    largest.unlink()
    assert "cannot be read" in str(refused(case, tmp_path / "in", tmp_path))
    (tmp_path / "in/manifest.ocdbt").unlink()
    assert "has no manifest.ocdbt, only the parts that single processes wrote" in str(
        refused(case, tmp_path / "in", tmp_path)
    )


def test_unfinished_checkpoints_are_refused(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders"]
    path = tmp_path / "gemma.orbax-checkpoint-tmp-17"
    shutil.copytree(case.path, path)
    assert "was never finished" in str(refused(case, path, tmp_path))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ('{"shape": [4, 96], "chunks": [4, 96], "dtype": "bfloat16"}', "not 3 axes"),
        ('{"shape": [4, 9, 32], "chunks": [4, 9, 32], "dtype": "bfloat16"}', "has shape [4, 9, 32], not [4, 96, 32]"),
        ('{"shape": [4, 96, 32], "chunks": [4, 96, 32], "dtype": "<i4"}', "is neither bfloat16 nor float32"),
        ('{"shape": [4, -1, 32], "chunks": [4, 96, 32], "dtype": "bfloat16"}', "is broken"),
        ('{"shape": [4, 96, 32], "chunks": [0, 96, 32], "dtype": "bfloat16"}', "is broken"),
        ("[]", "is broken"),
        ("{", "is broken"),
    ],
)
def test_headers_are_held_against_the_model(cases: Mapping[str, Case], header: str, words: str, tmp_path: Path) -> None:
    case = cases["folders"]
    shutil.copytree(case.path, tmp_path / "in")
    (tmp_path / "in/transformer/layer_0/attn/q_einsum.w/.zarray").write_text(header)
    assert words in str(refused(case, tmp_path / "in", tmp_path))


def test_missing_and_unknown_arrays_are_named(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders"]
    shutil.copytree(case.path, tmp_path / "in")
    metadata = json.loads((tmp_path / "in/_METADATA").read_text())
    metadata["tree_metadata"] = {}
    (tmp_path / "in/_METADATA").write_text(json.dumps(metadata))
    for name in ("layer_1/pre_ffw_norm.scale", "layer_5/attn/q_einsum.w"):
        shutil.rmtree(tmp_path / "in/transformer" / name)
    error = str(refused(case, tmp_path / "in", tmp_path))
    assert "transformer/layer_1/pre_ffw_norm/scale is missing" in error
    assert "transformer/layer_5/attn/q_einsum is missing" in error
    shutil.copytree(case.path, tmp_path / "more")
    there = tmp_path / "more/transformer"
    shutil.copytree(there / "final_norm.scale", there / "layer_0/attn/q_einsum.lora_a")
    assert "arrays that Gemma 3 does not have: transformer/layer_0/attn/q_einsum/lora_a" in str(
        refused(case, tmp_path / "more", tmp_path)
    )
    shutil.move(there / "layer_0/attn/q_einsum.lora_a", there / "embedder.mm_output_embedding")
    record = convert(tmp_path / "more", tmp_path / "out", to="dense", **case.options)
    assert any("left behind" in n and "mm_output_embedding" in n for n in record.notes)


def test_other_models_and_folders_are_refused(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders"]
    with pytest.raises(CheckpointError, match="no orbax checkpoint"):
        convert(case.beside, tmp_path / "out", to="dense", source_format="flax")
    shutil.copytree(case.path, tmp_path / "in")
    shutil.move(tmp_path / "in/transformer/embedder.input_embedding", tmp_path / "in/transformer/embedder.table")
    metadata = json.loads((tmp_path / "in/_METADATA").read_text())
    (tmp_path / "in/_METADATA").write_text(json.dumps(metadata | {"tree_metadata": {}}))
    error = str(refused(case, tmp_path / "in", tmp_path))
    assert "is no Flax checkpoint of Gemma 3: there is no transformer/embedder/input_embedding" in error
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        shutil.copytree(case.path, tmp_path / "two" / name)
    with pytest.raises(CheckpointError, match="several orbax checkpoints: a, b"):
        convert(tmp_path / "two", tmp_path / "out", to="dense", source_format="flax")


def test_a_config_has_to_fit(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["text bf16"]
    error = str(refused(case, case.path, tmp_path, config=None))
    assert "has the shape of no published Gemma 3 (layers 7, hidden 96, ffw 160, heads 4, kv_heads 1" in error
    assert "--config FILE" in error
    config = json.loads((case.beside / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6, "vocab_size": 300}))
    error = str(refused(case, case.path, tmp_path, config=tmp_path / "config.json"))
    assert "layers 6, not 7; vocab_size 300, not 320 or 64 more" in error
    with pytest.raises(UsageError, match="is not of model_type gemma3_text"):
        open_flax(case.path, config=cases["pictures bf16"].beside, tokenizer=case.beside)
    with pytest.raises(UsageError, match="float16 is no dtype of a Flax checkpoint"):
        open_flax(case.path, dtype="float16", **case.options)


# ------------------------------------------------------------------------------------------- sizes, config, tokenizer


def headers_only(folder: Path, size: gemma3.Size, tower: gemma3.TowerShape | None) -> Path:
    """A checkpoint of a real size, of which only the headers are there."""
    for piece in layout(size.shape, tower, size.shape.vocab + (64 if tower else 0)):
        leaf = piece.array if piece.array.endswith(("scale", "bias", "kernel", "embedding")) else f"{piece.array}/w"
        key = leaf.rpartition("/")
        place = folder / f"{key[0]}.{key[2]}"
        place.mkdir(parents=True, exist_ok=True)
        header = {"shape": piece.stored, "chunks": piece.stored, "dtype": "<f4", "zarr_format": 2}
        (place / ".zarray").write_text(json.dumps(header))
        (place / ".".join("0" for _ in piece.stored)).touch()
    (folder / "_METADATA").write_text("{}")
    return folder


@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("size", gemma3.SIZES, ids=lambda s: s.name)
def test_the_four_sizes_are_recognised_and_their_models_have_the_tensors_of_the_table(
    size: gemma3.Size, pictures: bool, tmp_path: Path
) -> None:
    tower = gemma3.TOWER if pictures else None
    folder = headers_only(tmp_path / f"gemma3-{size.name}-it-int4", size, tower)
    tiny.save_tokenizer(tmp_path)
    source = open_flax(folder)
    config = transformers.AutoConfig.for_model(**source.config)
    with torch.device("meta"):
        model = getattr(transformers, source.config["architectures"][0])(config)
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n != "lm_head.weight"}
    ours = {_in_tree(e.name): e.shape for e in source.entries.values()}
    assert ours == expected
    published = {"1b": 1.0e9, "4b": 3.88e9, "12b": 11.77e9, "27b": 27.0e9}  # as keras-hub's presets count them
    decoder = sum(t.numel() for n, t in model.named_parameters() if "vision" not in n and "projector" not in n)
    assert decoder == pytest.approx(published[size.name], rel=0.01)
    text = config.get_text_config()
    assert text.layer_types.count("full_attention") == size.shape.layers // 6
    factor = text.rope_parameters["full_attention"].get("factor")
    assert factor == (None if size.name == "1b" else 8.0)
    assert text.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert text.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert text.eos_token_id == [1, 106]


def _in_tree(name: str) -> str:
    """Of transformers' module tree, for a name on disk."""
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("vision_tower.vision_model.", "model.vision_tower.")
    return name.replace("multi_modal_projector.", "model.multi_modal_projector.")


def test_files_that_belong_to_it_arrive(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["pictures bf16"]
    (case.path.parent / "tokenizer.model").write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", flax.VOCAB))
    (case.path.parent / "LICENSE").write_text("Gemma Terms of Use")
    try:
        record = convert(case.path.parent, tmp_path / "out", to="dense", config=case.beside)
    finally:
        (case.path.parent / "tokenizer.model").unlink()
        (case.path.parent / "LICENSE").unlink()
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"} <= found
    assert {"generation_config.json", "preprocessor_config.json", "processor_config.json", "config.json"} <= found
    assert any("made from tokenizer.model alone" in n for n in record.notes)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [1, 106]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == flax.VOCAB
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.model beside it"):
        open_flax(case.path, config=case.beside)
    with pytest.raises(UsageError, match="holds no tokenizer"):
        open_flax(case.path, config=case.beside, tokenizer=case.path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", flax.VOCAB - 10))
    with pytest.raises(CheckpointError, match="has 310 tokens, and the checkpoint 320"):
        open_flax(case.path, config=case.beside, tokenizer=tmp_path / "tokenizer.model")


def test_the_users_files_win(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["text bf16"]
    shutil.copytree(case.beside, tmp_path / "own")
    (tmp_path / "own/generation_config.json").write_text('{"top_k": 3}')
    (case.path.parent / "LICENSE").write_text("Gemma Terms of Use")
    try:
        convert(case.path.parent, tmp_path / "out", to="dense", config=case.beside, tokenizer=tmp_path / "own")
    finally:
        (case.path.parent / "LICENSE").unlink()
    assert (tmp_path / "out/LICENSE").read_text() == "Gemma Terms of Use"
    assert (tmp_path / "out/generation_config.json").read_text() == '{"top_k": 3}'
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (case.beside / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["sliding_window"] == flax.TEXT["sliding_window"]


@pytest.mark.parametrize("kind", ["text bf16", "text f32", "pictures bf16"])
def test_gguf_holds_the_weights_of_the_dense_copy(cases: Mapping[str, Case], kind: str, tmp_path: Path) -> None:
    case = cases[kind]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", flax.VOCAB))
    options = {"config": case.beside, "tokenizer": tmp_path / "tokenizer.model"}
    convert(case.path, tmp_path / "dense", to="dense", **options)
    record = convert(case.path, tmp_path / "gguf", to="gguf", **options)
    assert record.exact == record.quantized == 49
    convert(tmp_path / "gguf", tmp_path / "again", to="dense")
    first, second = tiny.stored(tmp_path / "dense"), tiny.stored(tmp_path / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name].to(tensor.dtype)), name


def test_without_tensorstore_the_message_says_what_to_install(
    cases: Mapping[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'halfbyte\[flax\]'"):
        open_flax(cases["text bf16"].path)


def test_auto_finds_flax_and_verify_knows_the_outcome(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["text bf16"]
    record = convert(case.path, tmp_path / "out", to="compressed-tensors", **case.options)
    assert record.source["format"] == "flax"
    convert(case.path, tmp_path / "dense", to="dense", **case.options)
    found = halfbyte.verify(tmp_path / "out", source=tmp_path / "dense")
    assert found.passed, [c for c in found.checks if c.status == "failed"]


@pytest.mark.parametrize("kind", [*KINDS, "zarr3", "folders", "nested"])
@pytest.mark.parametrize("to", ["compressed-tensors", "awq", "dense"])
def test_verify_reads_it_beside_what_was_made(cases: Mapping[str, Case], kind: str, to: str, tmp_path: Path) -> None:
    case = cases[kind]
    convert(case.path, tmp_path / "out", to=to, **case.options)
    record = halfbyte.verify(tmp_path / "out", source=case.path, reload=False)
    assert record.passed, [c for c in record.checks if c.status == "failed"]
    details = {c.name: c.detail for c in record.checks}
    assert details["error"].startswith("49 of 49 weights equal the source's bit for bit")
    assert details["copies"].startswith(f"{len(case.made.model.state_dict()) - 49 - 1} tensors equal to the source")


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("leaf", ["mlp.up_proj.weight_packed", "self_attn.k_norm.weight"])
def test_verify_finds_one_changed_number(cases: Mapping[str, Case], leaf: str, recorded: bool, tmp_path: Path) -> None:
    case = cases["text bf16"]
    convert(case.path, tmp_path / "out", to="compressed-tensors", **case.options)
    tensors = tiny.stored(tmp_path / "out")
    changed = tensors[f"model.layers.3.{leaf}"].flatten()
    changed[:1] += 1
    tensors[f"model.layers.3.{leaf}"] = changed.view_as(tensors[f"model.layers.3.{leaf}"])
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    if not recorded:
        (tmp_path / "out/convert.json").unlink()
    record = halfbyte.verify(tmp_path / "out", source=case.path, reload=False)
    named = [p for c in record.checks if c.name in ("copies", "error") for p in c.problems]
    assert len(named) == 1
    assert named[0].startswith(f"model.layers.3.{leaf.removesuffix('_packed')} ")


def test_verify_takes_what_was_moved_onto_its_grid(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case = cases["folders f32"]

    def change(w: torch.Tensor) -> None:
        w[2] = torch.nextafter(w[2], torch.tensor(torch.inf))

    path = rewritten(case, tmp_path / "in", "transformer/layer_0/attn/q_einsum/w", change)
    convert(path, tmp_path / "moved", to="awq", allow_requantize=True, **case.options)
    record = halfbyte.verify(tmp_path / "moved", source=path, reload=False)
    assert record.passed, [c for c in record.checks if c.status == "failed"]
    assert "48 of 49 weights equal" in next(c.detail for c in record.checks if c.name == "error")


@pytest.mark.parametrize("kind", ["text bf16", "text f32", "pictures f32"])
def test_verify_reads_it_beside_a_gguf(cases: Mapping[str, Case], kind: str, tmp_path: Path) -> None:
    case = cases[kind]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", flax.VOCAB))
    options = {"config": case.beside, "tokenizer": tmp_path / "tokenizer.model"}
    convert(case.path, tmp_path / "gguf", to="gguf", **options)
    record = halfbyte.verify(tmp_path / "gguf", source=case.path)
    assert record.passed, [c for c in record.checks if c.status == "failed"]
    assert "49 of 49 quantised weights equal" in next(c.detail for c in record.checks if c.name == "error")


@pytest.mark.parametrize("kind", ["text bf16", "pictures f32", "nested"])
def test_inspect_reads_headers(cases: Mapping[str, Case], kind: str) -> None:
    case = cases[kind]
    found = halfbyte.inspect(case.path)
    assert (found.quantization, found.format, found.blocks) == ("none", "flax", flax.TEXT["num_hidden_layers"])
    assert found.architecture == type(case.made.model).__name__
    assert found.parameters == sum(a.numel() for a in case.made.arrays.values())
    assert {g.scheme for g in found.groups} == {"F32" if kind.endswith("f32") else "BF16"}
