"""Models named by a hub id, fetched by the real ``huggingface_hub`` from a stand-in for the hub (``fake_hub``)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Models
from fake_hub import Hub, serve


@pytest.fixture
def hub(tiny_model: Models, tmp_path: Path) -> Iterator[Hub]:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", shards=2), model)
    (model / "modeling_evil.py").write_text("raise SystemExit('code from a checkpoint ran')")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    with serve(Hub({"org/tiny": model, "org/locked": model}, gated={"org/locked"})) as hub:
        yield hub


def halfbyte(hub: Hub, cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "halfbyte", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_plan_fetches_headers_and_no_weights(hub: Hub, tmp_path: Path) -> None:
    from_hub = halfbyte(hub, tmp_path / "cache", "plan", "org/tiny", "--group-size", "32", "--json")
    assert from_hub.returncode == 0, from_hub.stderr
    from_folder = halfbyte(hub, tmp_path / "cache", "plan", hub.models["org/tiny"], "--group-size", "32", "--json")
    plans = [json.loads(p.stdout) for p in (from_hub, from_folder)]
    for changing in ("source", "estimates"):
        for plan in plans:
            del plan[changing]
    assert plans[0] == plans[1]
    fetched = {name for method, name, _ in hub.fetched if method == "GET"}
    assert not fetched & {"modeling_evil.py", "pytorch_model.bin"}
    # Of weights only their beginnings, by ranges.
    assert all(size <= 100_001 for method, name, size in hub.fetched if name.endswith(".safetensors"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_whole_way_from_a_hub_id(hub: Hub, tmp_path: Path, text_file: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    text = f"text:{text_file}"
    options = ["--group-size", "32", "--calibration", text, "--samples", "2", "--seq-len", "32"]
    made = halfbyte(hub, cache, "quantize", "org/tiny", out, *options)
    assert made.returncode == 0, made.stderr
    assert not {name for _, name, _ in hub.fetched} & {"modeling_evil.py", "pytorch_model.bin"}
    assert "halfbyte verify" in made.stdout
    assert "--source org/tiny" in made.stdout
    checked = halfbyte(hub, cache, "verify", out, "--source", "org/tiny")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    compared = halfbyte(hub, cache, "compare", "org/tiny", out, "--tokens", "64", "--window", "32", "--json")
    assert compared.returncode == 0, compared.stderr
    assert json.loads(compared.stdout)["tokens"] == 64
    # The same bytes as from the folder, and the manifest names the source as the user did.
    local = tmp_path / "local"
    assert halfbyte(hub, cache, "quantize", hub.models["org/tiny"], local, *options).returncode == 0
    for path in local.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    source = json.loads((out / "halfbyte.json").read_text())["source"]
    assert (source["name"], source["origin"]) == ("org/tiny", "hub")
    assert not list(out.glob("*.py"))
    assert halfbyte(hub, cache, "card", out).returncode == 0
    text = (out / "README.md").read_text()
    assert "\nbase_model: org/tiny\n" in text
    assert "\nlicense: mit\n" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "there is neither such a folder nor such a model on the hub. Check the spelling"),
        ("org/locked", "access to this model must be granted by its owner. Accept its terms"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_ids_that_cannot_be_fetched(hub: Hub, tmp_path: Path, command: str, name: str, message: str) -> None:
    out = [tmp_path / "out"] if command == "quantize" else []
    failed = halfbyte(hub, tmp_path / "cache", command, name, *out)
    assert failed.returncode == 2
    assert f"halfbyte: {name}: {message}" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out*"))


def test_an_unreachable_hub(hub: Hub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    failed = halfbyte(hub, tmp_path / "cache", "plan", "org/tiny")
    assert failed.returncode == 2
    assert "halfbyte: org/tiny: is no local folder, and the hub cannot be reached" in failed.stderr
    assert "Check the network" in failed.stderr


def test_manifests_of_a_hub_id_need_headers_alone(hub: Hub, tmp_path: Path) -> None:
    made = halfbyte(hub, tmp_path / "cache", "deploy", "kserve", "org/tiny", "-o", tmp_path / "out", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["name"] == "tiny"
    assert 'storageUri: "hf://org/tiny"' in (tmp_path / "out" / "inferenceservice.yaml").read_text()
    weights = [sent for method, file, sent in hub.fetched if method == "GET" and file.endswith(".safetensors")]
    assert sum(weights) < sum(f.stat().st_size for f in hub.models["org/tiny"].glob("*.safetensors")) / 2
    run = halfbyte(hub, tmp_path / "cache", "deploy", "podman", "org/tiny", "-o", tmp_path / "podman")
    assert run.returncode == 0, run.stderr
    assert "--model=org/tiny" in (tmp_path / "podman" / "run.sh").read_text()
    locked = halfbyte(hub, tmp_path / "cache", "deploy", "kserve", "org/locked", "-o", tmp_path / "no")
    assert locked.returncode == 2
    assert "access to this model must be granted by its owner" in locked.stderr
