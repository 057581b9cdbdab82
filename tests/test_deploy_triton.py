"""Triton's repositories as files; the real server is asked in ``tests/engines/test_tritonserver.py``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import Deploy
from deployments import NAME
from pbtxt import parse_config


def test_triton_repository(deployed: Deploy, ferry: Path) -> None:
    folder = deployed("triton", gpus=2, trace=True, max_batch=5)
    front, stream = (
        parse_config((folder / f"model_repository/{n}/config.pbtxt").read_text()) for n in (NAME, f"{NAME}_stream")
    )
    assert (front["name"], stream["name"]) == (NAME, f"{NAME}_stream")
    wanted = ["text_input", "max_length", "max_new_tokens", "do_sample", "top_k", "top_p", "temperature"]
    wanted += ["repetition_penalty", "stream", "seed", "stop"]
    for config in (front, stream):
        assert [i["name"] for i in config["input"]] == wanted
        assert [i["name"] for i in config["input"] if not i.get("optional")] == ["text_input"]
        assert config["output"] == [{"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]}]
        assert (config["backend"], config["max_batch_size"]) == ("python", 0)
    assert stream["model_transaction_policy"] == {"decoupled": True}
    assert "model_transaction_policy" not in front
    parameters = {p["key"]: p["value"]["string_value"] for p in stream["parameters"]}
    assert parameters["enable_inference_trace"] == "true"
    assert (parameters["gpus"], parameters["max_batch"]) == ("2", "5")
    assert stream["instance_group"] == [{"kind": "KIND_MODEL", "count": 1}]
    placed = folder / f"model_repository/{NAME}_stream" / parameters["checkpoint"]
    assert (placed / "model.safetensors").read_bytes() == (ferry / "model.safetensors").read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {f.name for f in placed.iterdir()}
    assert {p["key"]: p["value"]["string_value"] for p in front["parameters"]}["engine_model"] == stream["name"]
    vllm = json.loads((folder / f"vllm_repository/{NAME}/1/model.json").read_text())
    assert (vllm["model"], vllm["tensor_parallel_size"]) == ("/mnt/models", 2)
    backend = parse_config((folder / f"vllm_repository/{NAME}/config.pbtxt").read_text())
    assert (backend["backend"], backend["name"]) == ("vllm", NAME)
    engines = {f.name for f in (folder / f"model_repository/{NAME}_stream/1").glob("*_engine.py")}
    assert engines == {"transformers_engine.py"}
    for file in (folder / "model_repository").rglob("*.py"):
        compile(file.read_text(), file, "exec")


def test_triton_with_llamacpp_has_a_gguf(deployed: Deploy, ferry_gguf: Path) -> None:
    another = ferry_gguf.with_name("two-files")
    another.mkdir()
    for name in ("model.gguf", "another.gguf"):
        shutil.copy(ferry_gguf / "model.gguf", another / name)
    for source in (None, ferry_gguf, another / "model.gguf"):
        folder = deployed("triton", source, engine="llamacpp", gpus=0)
        placed = folder / f"model_repository/{NAME}_stream/checkpoint"
        assert [f.name for f in placed.glob("*.gguf")] == ["model.gguf"]
        assert "xllamacpp" in (folder / "requirements.txt").read_text()


def test_weights_may_be_linked_or_left_out(deployed: Deploy, ferry: Path) -> None:
    linked = deployed("triton", weights="link") / f"model_repository/{NAME}_stream/checkpoint/model.safetensors"
    assert linked.stat().st_ino == (ferry / "model.safetensors").stat().st_ino
    assert list((deployed("triton", weights="none") / f"model_repository/{NAME}_stream/checkpoint").iterdir()) == []


def test_parse_config_refuses_what_is_broken() -> None:
    for text in ("a {", "a [ 1", "}", "a:"):
        with pytest.raises(ValueError, match=r"."):
            parse_config(text)
