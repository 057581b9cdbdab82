"""``convert`` on checkpoints that other tools have written, and its own decoded by theirs.

    llm-compressor   writes compressed-tensors                       its environment, `envs/make.sh llmcompressor`
    AutoRound        writes GPTQ, AWQ, its own and compressed-tensors; its GPTQ Linears decode ours   `... autoround`
    AutoAWQ          its packing functions read ours, and pack what we read   HALFBYTE_AUTOAWQ: its source, unpacked

AutoGPTQ and GPTQModel do not install here (they compile against CUDA, or want another torch): their layout is
covered through AutoRound's Linears, which are theirs, and by the literals in ``test_convert.py``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import coded
import halfbyte
import tiny
from coded import random_coded
from conftest import Models

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def python(tool: str) -> Path:
    """The interpreter of a tool's environment; the test is skipped where there is none."""
    variable = f"HALFBYTE_{tool.upper()}_PYTHON"
    path = Path(os.environ.get(variable, ROOT / f".envs/{tool}/bin/python"))
    if not path.exists():
        pytest.skip(f"no environment of {tool}: make it with `envs/make.sh {tool}`, or set {variable}")
    return path


def run(tool: str, script: str, *arguments: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python(tool)), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def exported(source: Path, out: Path, form: str, *numbers: object) -> Path:
    run("autoround", "make_autoround.py", source, out, form, *numbers)
    (made,) = {p.parent for p in out.rglob("config.json")}
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The Linears of a dense float32 copy."""
    return {n: t for n, t in tiny.stored(folder).items() if n.endswith("_proj.weight")}


def dense(source: Path, out: Path) -> dict[str, torch.Tensor]:
    halfbyte.convert(source, out, to="dense", dtype="float32")
    return weights(out)


def nearly(found: dict[str, torch.Tensor], original: dict[str, torch.Tensor], limit: float) -> None:
    """Each weight near to the original: a row, column or nibble in the wrong place is far away (1.4)."""
    assert len(found) == 14
    for name, weight in found.items():
        before = original[name].float()
        assert float((weight - before).norm() / before.norm()) < limit, name


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8"])
def test_llmcompressors_own(scheme: str, tiny_model: Models, tmp_path: Path) -> None:
    source = tiny_model("llama")
    made = tmp_path / "made"
    run("llmcompressor", "make_llmcompressor.py", source, made, scheme)
    found = dense(made, tmp_path / "dense")
    nearly(found, tiny.stored(source), 0.02 if scheme.startswith("W8") else 0.2)
    if scheme == "W8A8":
        return
    assert all(torch.equal(t, tiny.decoded(made)[n]) for n, t in found.items())
    halfbyte.convert(made, tmp_path / "same", to="compressed-tensors")
    ours, theirs = tiny.stored(tmp_path / "same"), tiny.stored(made)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    for to in ("gptq-v2", *(("awq",) if scheme.startswith("W4") else ())):
        halfbyte.convert(made, tmp_path / to, to=to)
        halfbyte.convert(tmp_path / to, tmp_path / f"{to}-back", to="compressed-tensors")
        back, same = tmp_path / f"{to}-back" / "model.safetensors", tmp_path / "same" / "model.safetensors"
        assert back.read_bytes() == same.read_bytes()


def test_autorounds_exports_of_one_rounding(tiny_model: Models, tmp_path: Path) -> None:
    """The same weights rounded alike and saved in three formats: converted, they are one."""
    source = tiny_model("llama")
    found = {}
    for form in ("auto_gptq", "auto_awq", "llm_compressor"):
        made = exported(source, tmp_path / form, form, 4, "sym", 32)
        found[form] = dense(made, tmp_path / f"{form}-dense")
        nearly(found[form], tiny.stored(source), 0.2)
        if form == "auto_gptq":
            decoded = decode(made, 1, 4, tmp_path)
            assert all(torch.equal(t, decoded[n]) for n, t in found[form].items())
        halfbyte.convert(made, tmp_path / f"{form}-ct", to="compressed-tensors")
    for form in ("auto_awq", "llm_compressor"):
        for name, weight in found["auto_gptq"].items():
            assert torch.equal(found[form][name], weight), (form, name)
    first = tiny.stored(tmp_path / "auto_gptq-ct")
    for form in ("auto_awq", "llm_compressor"):
        stored = tiny.stored(tmp_path / f"{form}-ct")
        assert stored.keys() == first.keys()
        for name, tensor in stored.items():
            assert torch.equal(tensor.double(), first[name].double()), (form, name)  # scales are bfloat16 in one


@pytest.mark.parametrize("form", ["auto_gptq", "auto_round"])
@pytest.mark.parametrize(("bits", "sym"), [(4, "asym"), (3, "sym"), (8, "sym"), (2, "asym")])
def test_autorounds_gptq(form: str, bits: int, sym: str, tiny_model: Models, tmp_path: Path) -> None:
    """Zero points are stored less one in AutoGPTQ's format, and in AutoRound's own where that says so."""
    source = tiny_model("llama")
    made = exported(source, tmp_path / "made", form, bits, sym, 32)
    found = dense(made, tmp_path / "dense")
    packing = tiny.config_of(made)["quantization_config"].get("packing_format", "auto_gptq")
    decoded = decode(made, 1 if "auto_gptq" in packing else 2, bits, tmp_path)
    nearly(found, tiny.stored(source), {2: 0.9, 3: 0.4, 4: 0.2, 8: 0.02}[bits])
    assert all(torch.equal(t, decoded[n]) for n, t in found.items())
    (made / "model.safetensors").chmod(0o644)
    for checkpoint, beside in ((tmp_path / "dense", made), (made, source)):
        record = halfbyte.verify(checkpoint, source=beside)
        assert record.passed, [c for c in record.checks if c.status == "failed"]


def decode(folder: Path, version: int, bits: int, tmp_path: Path) -> dict[str, torch.Tensor]:
    out = tmp_path / "decoded.safetensors"
    run("autoround", "decode_autoround.py", folder / "model.safetensors", version, bits, 32, out)
    return load_file(out)


@pytest.mark.parametrize(("to", "version"), [("gptq", 1), ("gptq-v2", 2)])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (4, False), (8, False)])
def test_ours_in_the_hands_of_their_linears(to: str, version: int, bits: int, symmetric: bool, tmp_path: Path) -> None:
    least = 1 if to == "gptq" else 0
    weight = random_coded(3, bits=bits, out=64, columns=96, symmetric=symmetric, least_zero=least)
    modules = {"model.layers.0.mlp.up_proj": coded.packed(weight)}
    source = coded.publish(tmp_path / "source", modules, coded.ct_config(weight))
    halfbyte.convert(source, tmp_path / "out", to=to)
    (found,) = decode(tmp_path / "out", version, bits, tmp_path).values()
    assert torch.equal(found.double(), torch.from_numpy(weight.dense()))


@pytest.fixture(scope="module")
def autoawq() -> Any:
    """AutoAWQ's Linear and its unpacking, from its source, without the rest (which wants transformers 4)."""
    named = os.environ.get("HALFBYTE_AUTOAWQ")
    if not named:
        pytest.skip("no AutoAWQ: unpack its source (pip download --no-deps autoawq==0.2.9), set HALFBYTE_AUTOAWQ")
    root = Path(named) / "awq"
    loaded = {}
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.modules.triton"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    gemm = types.ModuleType("awq.modules.triton.gemm")
    gemm.awq_gemm_triton = gemm.awq_dequantize_triton = None  # type: ignore[attr-defined]
    sys.modules["awq.modules.triton.gemm"] = gemm
    for name in ("utils.module", "utils.utils", "utils.packing_utils", "modules.linear.gemm"):
        spec = importlib.util.spec_from_file_location(f"awq.{name}", root / f"{name.replace('.', '/')}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"awq.{name}"] = module
        spec.loader.exec_module(module)
        loaded[name] = module
    yield loaded
    for name in [n for n in sys.modules if n == "awq" or n.startswith("awq.")]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
def test_autoawqs_own_packing(autoawq: Any, tmp_path: Path) -> None:
    """What WQLinear_GEMM.from_linear packs is what we read; what we write is what dequantize_gemm reads."""
    name = "model.layers.0.mlp.up_proj"
    weight = random_coded(4, out=64, columns=96, symmetric=False, dtype=torch.float16)
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = torch.from_numpy(weight.dense()).float()
    scales, zeros = weight.scales.T.contiguous(), torch.from_numpy(weight.zeros).T.contiguous()
    made = autoawq["modules.linear.gemm"].WQLinear_GEMM.from_linear(
        linear, 4, 32, scales=scales.float(), zeros=zeros.float()
    )
    theirs = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales}
    source = coded.publish(tmp_path / "theirs", {name: theirs}, coded.awq_config(weight))
    halfbyte.convert(source, tmp_path / "ct", to="compressed-tensors")
    found = tiny.stored(tmp_path / "ct")
    packed = coded.packed(weight)
    assert torch.equal(found[f"{name}.weight_packed"], packed["weight_packed"])
    assert torch.equal(found[f"{name}.weight_zero_point"], packed["weight_zero_point"])
    halfbyte.convert(tmp_path / "ct", tmp_path / "ours", to="awq")
    ours = tiny.stored(tmp_path / "ours")
    parts = [ours[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")]
    dense = autoawq["utils.packing_utils"].dequantize_gemm(*parts[:2], parts[2].float(), 4, 32)
    assert torch.equal(dense.T.double(), torch.from_numpy(weight.dense()))
