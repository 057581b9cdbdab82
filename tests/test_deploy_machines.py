"""What ``deploy`` writes for one machine, run with podman, ilab and rsync replaced by something that notes its call."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from conftest import Deploy
from deployments import NAME, called, manifest, options_of, quadlet
from halfbyte.errors import UsageError


def test_scripts_are_valid_and_executable(deployed: Deploy) -> None:
    scripts = [f for t in ("podman", "rhel-ai") for f in deployed(t).glob("*.sh")]
    assert len(scripts) == 4
    for script in scripts:
        assert script.stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", script], check=True)


def test_podman_runs_what_the_card_runs(deployed: Deploy, ferry: Path, tmp_path: Path) -> None:
    argv = called(deployed("podman", gpus=2), "run.sh", path=tmp_path / "bin")[0]
    assert argv[:3] == ["podman", "run", "--rm"]
    assert argv[argv.index("--device") + 1] == "nvidia.com/gpu=all"
    assert f"{ferry.resolve()}:/mnt/models:ro" in argv
    assert json.loads(next(a for a in argv if a.startswith("--entrypoint=")).partition("=")[2])[:2] == ["python3", "-m"]
    assert "--tensor-parallel-size=2" in argv
    moved = called(deployed("podman"), "run.sh", path=tmp_path / "bin", MODEL_DIR="/else where")[0]
    assert "/else where:/mnt/models:ro" in moved


def test_a_folder_with_odd_characters(deployed: Deploy, ferry: Path, tmp_path: Path) -> None:
    odd = tmp_path / "it's 50% off"
    shutil.copytree(ferry, odd)
    folder = deployed("podman", odd)
    assert f"{odd}:/mnt/models:ro" in called(folder, "run.sh", path=tmp_path / "bin")[0]
    assert quadlet(folder)["Volume"] == [f"{odd}:/mnt/models:ro".replace("%", "%%")]
    assert str(odd) in manifest(deployed("compose", odd), "compose.yaml")["services"]["server"]["volumes"][0]["source"]
    rhel = called(deployed("rhel-ai", odd), "get.sh", path=tmp_path / "bin")
    assert rhel[0][-2] == f"{odd}/"
    with pytest.raises(UsageError, match=r"cannot be given a folder with any of"):
        deployed("podman", shutil.copytree(ferry, tmp_path / "a:b"))


def test_ilab(deployed: Deploy, ferry: Path, tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    folder = deployed("rhel-ai", gpus=4)
    kept = f"{bin_}/.cache/instructlab/models/{NAME}"
    get = called(folder, "get.sh", path=bin_)
    assert get[0][0] == "rsync"
    assert get[0][-2:] == [f"{ferry.resolve()}/", f"{kept}/"]
    serve = called(folder, "serve.sh", path=bin_)[0]
    assert serve[:3] == ["ilab", "model", "serve"]
    before, after = serve[3 : serve.index("--")], serve[serve.index("--") + 1 :]
    assert options_of(before) == {"model-path": kept, "backend": "vllm", "gpus": "4"}
    assert options_of(after)["served-model-name"] == NAME
    chat = called(folder, "chat.sh", path=bin_)[0]
    assert options_of(chat) == {"model": NAME, "endpoint-url": "http://localhost:8000/v1"}
    image = "docker://registry.redhat.io/rhelai1/ferry-1b:1.5"
    from_image = deployed("rhel-ai", storage=image)
    assert called(from_image, "get.sh", path=bin_)[0] == [
        *("ilab", "model", "download", "--repository", image.removesuffix(":1.5"), "--release", "1.5")
    ]
    assert options_of(called(from_image, "serve.sh", path=bin_)[0])["model-path"].endswith("/models/ferry-1b")
