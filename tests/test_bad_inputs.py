"""Bad inputs: one line that says what is wrong, where, and what to do; exit status 2; no folder left behind."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from conftest import Models
from halfbyte.cli.main import entry_point
from interrupted import CONTEXT

Edit = Callable[[Path], None]


@pytest.fixture
def source(tiny_model: Models, tmp_path: Path) -> Path:
    """A copy of a tiny Llama, to be spoilt."""
    shutil.copytree(tiny_model("llama"), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def sharded(tiny_model: Models, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model("llama", shard="60KB"), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def refuse(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command line, see it refuse, and return what it said on its line.

    Progress lines may stand before the message where work had begun; nothing may stand after it.
    """

    def call(source: Path, *options: str, out: Path | None = None, begun: bool = False) -> str:
        out = out or tmp_path / "out"
        arguments = ["quantize", str(source), str(out), "--group-size", "32", "--device", "cpu"]
        arguments += ["--calibration", f"text:{text_file}", "--samples", "4", "--seq-len", "40", *options]
        monkeypatch.setattr(sys, "argv", ["halfbyte", *arguments])
        there = {p.name for p in tmp_path.iterdir()}
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            entry_point()
        said = capfd.readouterr()
        assert stopped.value.code == 2
        lines = said.err.splitlines()
        assert lines[-1].startswith("halfbyte: ")
        assert begun or len(lines) == 1
        assert "Traceback" not in said.err
        if "--json" in options:
            assert json.loads(said.out) == {"error": lines[-1].removeprefix("halfbyte: "), "exit_status": 2}
        else:
            assert said.out == ""
        assert {p.name for p in tmp_path.iterdir()} == there
        return lines[-1].removeprefix("halfbyte: ")

    return call


def set_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    tensors = tiny.stored(folder)
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(tiny.config_of(folder) | values))


# The checkpoint


def test_no_such_folder(refuse: Callable[..., str], tmp_path: Path) -> None:
    said = refuse(tmp_path / "nowhere")
    assert said == (
        f"{tmp_path}/nowhere: there is no such folder. Give a checkpoint folder, or a hub id such as org/name."
    )


def test_a_file_for_a_folder(refuse: Callable[..., str], source: Path) -> None:
    assert "is a file, not a checkpoint folder" in refuse(source / "model.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(keep: int, refuse: Callable[..., str], source: Path) -> None:
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    said = refuse(source)
    assert said.startswith(f"{file}: is not a whole safetensors file: ")
    assert said.endswith(f"({len(data[:keep])} bytes on disk). Download it again.")


def test_a_truncated_shard_and_a_missing_one_are_told_at_once(refuse: Callable[..., str], sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    said = refuse(sharded)
    assert said.startswith("2 problems: (1) ")
    assert f"1 of {len(shards)} shards are missing: {shards[1].name}. Download them again." in said
    assert f"{shards[0]}: is not a whole safetensors file" in said


def test_a_missing_shard(refuse: Callable[..., str], sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[-1].unlink()
    said = refuse(sharded, "--json")
    assert said == f"{sharded}: 1 of {len(shards)} shards are missing: {shards[-1].name}. Download them again."


def test_shards_without_an_index(refuse: Callable[..., str], sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "Restore the index; without it a missing shard could not be noticed." in refuse(sharded)


def test_an_index_that_lies(refuse: Callable[..., str], sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.extra"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    assert "lists model.layers.9.extra in " in refuse(sharded)


def test_an_index_that_leaves_the_folder(refuse: Callable[..., str], sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../../etc/passwd"
    path.write_text(json.dumps(index))
    assert "names a file outside the folder" in refuse(sharded)


def test_only_pickles(refuse: Callable[..., str], source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    said = refuse(source)
    assert "holds only pickle files (pytorch_model.bin), and loading a pickle runs code" in said
    assert "Use a revision with .safetensors files" in said


def test_no_weights_at_all(refuse: Callable[..., str], source: Path) -> None:
    (source / "model.safetensors").unlink()
    assert refuse(source).endswith("holds no .safetensors file. Give a folder with model weights.")


@pytest.mark.parametrize("content", ["{", "", "[1]", '"llama"', "\ufeff{}", "null"])
def test_a_config_that_is_not_one(content: str, refuse: Callable[..., str], source: Path) -> None:
    (source / "config.json").write_text(content)
    said = refuse(source)
    assert "config.json" in said
    if content == "{":
        assert "not valid JSON at line 1, column 2" in said
        assert said.endswith("Repair the file or download it again.")


def test_no_config(refuse: Callable[..., str], source: Path) -> None:
    (source / "config.json").unlink()
    assert refuse(source) == f"{source}: config.json is missing. Give a folder in the Hugging Face layout."


def test_a_config_that_is_binary(refuse: Callable[..., str], source: Path) -> None:
    (source / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json: cannot be read" in refuse(source)


def test_an_already_quantised_source(refuse: Callable[..., str], source: Path) -> None:
    set_config(source, quantization_config={"quant_method": "awq"})
    assert refuse(source) == f"{source}: is quantised already (awq). Start from the original checkpoint."


def test_an_architecture_that_transformers_does_not_know(refuse: Callable[..., str], source: Path) -> None:
    set_config(source, model_type="llama9", architectures=["Llama9ForCausalLM"])
    said = refuse(source, begun=True)
    assert said.startswith(f"{source}: transformers ")
    assert "cannot read its config" in said
    assert said.endswith("Update transformers if the model is newer than it; code from checkpoints is never run.")


def test_a_model_that_decodes_nothing(refuse: Callable[..., str], tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    said = refuse(tmp_path / "bert", begun=True)
    assert "no decoder blocks were found for architecture BertModel" in said
    assert "halfbyte quantises decoder-only language models" in said


def test_code_in_a_checkpoint_is_not_run(refuse: Callable[..., str], source: Path, tmp_path: Path) -> None:
    (source / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    set_config(source, model_type="own", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    assert "code from checkpoints is never run" in refuse(source, begun=True)
    assert not (tmp_path / "ran").exists()


def test_fewer_layers_than_announced(refuse: Callable[..., str], source: Path) -> None:
    set_config(source, num_hidden_layers=4)
    said = refuse(source)
    assert "layers 2, 3 of 4 are absent from the weights" in said
    assert said.endswith("The checkpoint is incomplete; download it again.")


def test_a_tensor_that_the_model_needs_is_absent(refuse: Callable[..., str], source: Path) -> None:
    tensors = tiny.stored(source)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    said = refuse(source, begun=True)
    assert "tensor model.layers.1.input_layernorm.weight is absent, which LlamaForCausalLM needs" in said


def test_shapes_that_the_config_does_not_announce(refuse: Callable[..., str], source: Path) -> None:
    set_config(source, intermediate_size=96)
    said = refuse(source, begun=True)
    assert "has shape (128, 64), the config asks for (96, 64)" in said


# Numbers


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, method: str, refuse: Callable[..., str], source: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    set_tensor(source, name, lambda w: w[3, 5].fill_(value))
    options = ["--method", "rtn"] if method == "rtn" else []
    said = refuse(source, *options, begun=True)
    assert said == (f"{name}: the source weight holds NaN or infinity. Download the checkpoint again, or --ignore it.")


def test_activations_that_overflow_name_block_module_and_sample(refuse: Callable[..., str], source: Path) -> None:
    """A single token's embedding is infinite, so that only the samples that hold it go wrong."""
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(source)(tiny.TEXT, add_special_tokens=False).input_ids
    windows = [ids[i * 39 : (i + 1) * 39] for i in range(4)]
    (only_in_third, *_) = [t for t in windows[2] if not any(t in w for i, w in enumerate(windows) if i != 2)]
    tensors = tiny.stored(source)
    tensors["model.embed_tokens.weight"][only_in_third] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    said = refuse(source, begun=True)
    assert said.startswith("model.layers.0.input_layernorm: activations are not finite for calibration sample 2 (")


def test_an_overflow_inside_a_block_names_the_module(refuse: Callable[..., str], source: Path) -> None:
    tensors = tiny.stored(source)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e38)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    said = refuse(source, begun=True)
    assert said.startswith("model.layers.0.mlp.up_proj: activations are not finite for calibration sample 0 (")
    assert said.endswith("Check the source weights with `halfbyte inspect`, or calibrate with other text.")


def test_a_token_outside_the_vocabulary(refuse: Callable[..., str], source: Path) -> None:
    tensors = tiny.stored(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:50].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    set_config(source, vocab_size=50)
    said = refuse(source, begun=True)
    assert "is outside the vocabulary of 50. Tokenizer and weights do not belong together." in said


# Calibration


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "too short: "),
        ("short.txt", "A ferry.", "too short: "),
        ("latin.txt", b"caf\xe9 " * 100, "is not UTF-8 text"),
        ("empty.jsonl", "", "every row is empty"),
        ("blank.jsonl", '{"text": " "}\n\n{"messages": []}\n', "every row is empty"),
        ("other.jsonl", '{"prompt": "x"}\n', "line 1: has no field 'text' or 'messages'"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("absent.txt", None, "there is no such file"),
    ],
)
def test_calibration_text_that_will_not_do(
    name: str, content: str | bytes | None, words: str, refuse: Callable[..., str], source: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    kind = "jsonl" if name.endswith("jsonl") else "text"
    said = refuse(source, "--calibration", f"{kind}:{path}", begun=True)
    assert words in said
    assert name in said
    assert said.count(". ") >= 1, "there is no remedy"


def test_more_tokens_than_positions(refuse: Callable[..., str], source: Path) -> None:
    said = refuse(source, "--seq-len", "300", begun=True)
    assert said == "--seq-len: 300 is more than the model's 256 positions. Use at most 256."


def test_no_tokenizer(refuse: Callable[..., str], source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    assert "holds no tokenizer files. Copy the tokenizer files" in refuse(source, begun=True)


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--scheme", "W5A16"],
            "--scheme: unknown scheme 'W5A16'. Use one of "
            "W4A16, W4A16_ASYM, W3A16, W2A16, W8A16, W8A8, W4A8, FP8_DYNAMIC, FP8_BLOCK.",
        ),
        (
            ["--scheme", "W8A8"],
            "--group-size 32: scheme W8A8 has one scale for each output channel and takes no group size. "
            "Leave --group-size out, or choose W4A16 or W8A16.",
        ),
        (
            ["--group-size", "96"],
            "--group-size: group size 96 is not supported by the engines. Use 32, 64, 128 or 'channel'.",
        ),
        (
            ["--calibration", "wikitext"],
            "--calibration: unknown calibration source 'wikitext'. Use one of: self, text:FILE, jsonl:FILE, "
            "hf:DATASET[:CONFIG][:SPLIT], vlm:FOLDER_OR_JSONL, random-tokens; or several with weights, "
            "SPEC*0.5+SPEC*0.5.",
        ),
        (["--ignore", "re:["], "--ignore re:[: 're:[' is not a regular expression: unterminated character set at"),
        (["--ignore", "re:.*"], "--ignore: nothing is left to quantise: every Linear is ignored or untargeted."),
        (["--samples", "0"], "Invalid value for '--samples': 0 is not in the range x>=1."),
        (["--method", "awq"], "Invalid value for '--method': 'awq' is not one of 'gptq', 'rtn'."),
        (["--group-size", "many"], "Invalid value for '--group-size': 'many' is neither a number nor 'channel'."),
        (["--frobnicate"], "No such option"),
        (["--recipe", "/nowhere.toml"], "Invalid value for '--recipe': File '/nowhere.toml' does not exist."),
    ],
)
def test_options_that_will_not_do(options: list[str], said: str, refuse: Callable[..., str], source: Path) -> None:
    assert refuse(source, *options).startswith(said)


def test_no_cuda_device(refuse: Callable[..., str], source: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert refuse(source, "--device", "cuda") == "--device cuda: torch sees no CUDA device. Use --device cpu."


def test_a_recipe_and_options_contradict(refuse: Callable[..., str], source: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('scheme = "W4A16"\n')
    said = refuse(source, "--recipe", str(tmp_path / "r.toml"))
    assert said.startswith("--recipe: a recipe already says scheme, group size, method and what to ignore.")


def test_group_sizes_that_do_not_divide_are_all_named(refuse: Callable[..., str], tmp_path: Path) -> None:
    """The words that people will read, for the number that made them famous."""
    source = tiny.build(tmp_path / "wide", intermediate_size=2880, num_hidden_layers=1)
    said = refuse(source, "--group-size", "128", "--ignore", "re:.*self_attn.*", "--ignore", "re:.*(gate|up)_proj")
    assert said == (
        "model.layers.0.mlp.down_proj: in_features 2880 is not divisible by group_size 128 (remainder 64). "
        "Use group_size 64 or 32, or skip it with --ignore."
    )
    said = refuse(source, "--group-size", "128")
    assert said.startswith("7 problems: (1) ")
    assert "model.layers.0.self_attn.q_proj: in_features 64 is not divisible by group_size 128 (remainder 64)." in said


# The output folder


def test_a_file_where_a_folder_should_go(refuse: Callable[..., str], source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    said = refuse(source, out=tmp_path / "taken" / "out")
    assert "cannot be written: Not a directory" in said
    assert said.endswith("Choose a folder that you may write to.")
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_existing_folder(refuse: Callable[..., str], source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    said = refuse(source, out=tmp_path / "taken")
    assert said == (
        f"{tmp_path}/taken: exists already. Choose another folder, or remove this one; it is left untouched."
    )


def _quantize_with_small_files(source: Path, out: Path, text: Path, said: Path, limit: int) -> None:
    sys.argv = ["halfbyte", "quantize", str(source), str(out), "--group-size", "32", "--device", "cpu"]
    sys.argv += ["--calibration", f"text:{text}", "--samples", "4", "--seq-len", "40"]
    sys.stderr = open(said, "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        entry_point()
    finally:
        sys.stderr.flush()


@pytest.mark.parametrize("limit", [100_000, 30_000])
def test_a_disk_that_is_too_small(limit: int, source: Path, text_file: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a limit: the shards do not fit, or not even the calibration tokens."""
    out, said = tmp_path / "out", tmp_path / "said"
    process = CONTEXT.Process(
        target=_quantize_with_small_files, args=(source, out, text_file, said, limit), daemon=True
    )
    process.start()
    process.join(120)
    assert process.exitcode == 2
    line = said.read_text().splitlines()[-1]
    assert line.startswith("halfbyte: ")
    assert ": the disk is full" in line
    assert line.endswith("Free space or choose another folder, then run again.")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "said"}
