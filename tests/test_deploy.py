"""What ``deploy`` writes, whatever the target: names that agree, what it refuses, and how the folder appears."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import halfbyte
from conftest import Deploy
from deployments import NAME, PVC, called, instruction, manifest, options_of, quadlet
from halfbyte.cli.deploy import command
from halfbyte.deployment import run
from halfbyte.deployment.options import TARGETS, Wishes
from halfbyte.deployment.subject import name_for, open_subject
from halfbyte.errors import CheckpointError, HalfbyteError, OutputError, UsageError
from halfbyte.records import DeployRecord, from_plain

# Names, ports and model paths agree


@pytest.fixture
def everywhere(deployed: Deploy, tmp_path: Path) -> dict[str, dict[str, str]]:
    """Every place that says how to start the server -> its model, served name, port and context."""
    found: dict[str, dict[str, str]] = {}

    def note(where: str, arguments: list[str], port: Any, mount: str) -> None:
        o = options_of(arguments)
        assert int(o["port"]) == int(port), where
        assert o["model"] == mount, where
        found[where] = {k: o[k] for k in ("model", "served-model-name", "max-model-len", "port")}

    podman = deployed("podman")
    argv = called(podman, "run.sh", path=tmp_path / "bin")[0]
    image = argv.index("registry.redhat.io/rhaiis/vllm-cuda-rhel9:3.2")
    o = options_of(argv[:image])
    note("podman run.sh", argv[image + 1 :], o["publish"].split(":")[-1], o["volume"].split(":")[1])
    unit = quadlet(podman)
    volume = unit["Volume"][0].split(":")
    note("podman quadlet", shlex.split(unit["Exec"][0]), unit["PublishPort"][0].split(":")[-1], volume[1])
    note(
        "podman Containerfile",
        instruction(podman, "CMD"),
        instruction(podman, "EXPOSE"),
        instruction(podman, "COPY").split()[1],
    )
    service = manifest(deployed("compose"), "compose.yaml")["services"]["server"]
    note("compose", service["command"], service["ports"][0].split(":")[-1], service["volumes"][0]["target"])
    kubernetes = deployed("kubernetes")
    pod = manifest(kubernetes, "deployment.yaml")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    note("kubernetes", container["args"], container["ports"][0]["containerPort"], mounts["weights"])
    kserve = deployed("kserve")
    server = manifest(kserve, "servingruntime.yaml")["spec"]["containers"][0]
    arguments = [
        a.replace("{{.Name}}", manifest(kserve, "inferenceservice.yaml")["metadata"]["name"]) for a in server["args"]
    ]
    note("kserve", arguments, server["ports"][0]["containerPort"], "/mnt/models")
    return found


def test_names_ports_and_paths_agree(everywhere: dict[str, dict[str, str]]) -> None:
    assert len(everywhere) == 6
    for where, said in everywhere.items():
        assert said["served-model-name"] == NAME, where
        assert said["model"] == "/mnt/models", where
        assert said["max-model-len"] == everywhere["compose"]["max-model-len"], where
        assert said["port"] == ("8080" if where == "kserve" else "8000"), where


@pytest.mark.parametrize("target", ["podman", "compose", "kubernetes", "kserve", "rhel-ai"])
def test_the_curl_of_each_readme_asks_for_this_model_at_this_port(deployed: Deploy, target: str) -> None:
    """The curl of the Llama card, run with curl against something that notes what is asked."""
    folder = deployed(target)
    readme = (folder / "README.md").read_text()
    block = re.search(r"(?m)^    curl (?:.+\n)+?(?=    +}')    +}'", readme)
    assert block is not None
    port = {"kserve": 8080}.get(target, 8000)
    if target in ("kserve", "kubernetes"):
        assert f"port-forward service/{NAME}{'-predictor 8080:80' if target == 'kserve' else ' 8000:8000'}" in readme
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        there = f"http://localhost:{port}"
        line = block[0].replace("$URL", there)
        assert there in line
        line = line.replace(there, f"http://127.0.0.1:{server.server_port}")
        subprocess.run(["bash", "-c", line], check=True, capture_output=True, timeout=60)
    path, kind, body = asked[0]
    assert (path, kind) == ("/v1/chat/completions", "application/json")
    assert body["model"] == NAME
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["messages"][0]["content"] == "How can a bee fly when its wings are so small?"


def test_every_file_says_what_it_is(deployed: Deploy) -> None:
    for target in TARGETS:
        folder = deployed(target, engine="auto")
        assert (folder / "README.md").read_text().startswith(f"# {NAME} ")
        for file in folder.rglob("*"):
            if file.suffix in (".yaml", ".sh", ".container", ".pbtxt") or "Containerfile" in file.name:
                head = next(x for x in file.read_text().splitlines() if not x.startswith("#!"))
                assert head.startswith("# "), file
                assert "Written by halfbyte" in file.read_text(), file
            elif file.suffix == ".py":
                assert file.read_text().startswith('"""'), file


def test_no_secret_is_ever_written(deployed: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_thisisasecret"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_API_KEY", "API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    for target in TARGETS:
        for file in deployed(target).rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_a_port_that_others_reach_asks_for_a_key(deployed: Deploy, tmp_path: Path) -> None:
    folder = deployed("podman", host="0.0.0.0")
    assert quadlet(folder)["Secret"] == [f"{NAME}-api-key,type=env,target=VLLM_API_KEY"]
    refused = subprocess.run([folder / "run.sh"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "set API_KEY to the key that callers must send" in refused.stderr
    argv = called(folder, "run.sh", path=tmp_path / "bin", API_KEY="k")[0]
    assert "VLLM_API_KEY" in argv
    assert "k" not in argv  # by name: a value would be seen in the list of processes
    assert "Secret" not in quadlet(deployed("podman"))
    line = next(x for x in (folder / "Containerfile").read_text().splitlines() if "podman run" in x).removeprefix("#")
    (folder / "image.sh").write_text(f"#!/bin/bash\n{line}\n")
    (folder / "image.sh").chmod(0o755)
    refused = subprocess.run([folder / "image.sh"], env={}, capture_output=True, text=True, check=False)
    assert "API_KEY: the key that callers must send" in refused.stderr
    argv = called(folder, "image.sh", path=tmp_path / "bin", API_KEY="k")[0]
    assert argv[argv.index("--env") + 1] == "VLLM_API_KEY"
    service = manifest(deployed("compose", host="0.0.0.0"), "compose.yaml")["services"]["server"]
    assert service["environment"]["VLLM_API_KEY"].startswith("${API_KEY:?")
    assert service["ports"] == ["0.0.0.0:8000:8000"]


# Names


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8", "llama-3-3-70b-instruct-quantized-w8a8"),
        ("/a/b/gemma-3-1b-it/", "gemma-3-1b-it"),
        ("/a/Mistral-Small-3.1-24B-Instruct-2503-quantized.w4a16", "mistral-small-3-1-24b-instruct-2503"),
        ("/a/some-model/model.gguf", "some-model"),
        ("x" * 50, "x" * 39),
    ],
)
def test_names(source: str, name: str) -> None:
    assert name_for(source, None) == name


@pytest.mark.parametrize("name", ["Upper", "a b", "-a", "a-", "", "a" * 40, "a.b", "a_b", "a\nb", "$(id)"])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError, match=r"--name: .* is no name that every target takes"):
        name_for("x", name)


# Bad input: found before anything is written


BAD: dict[str, tuple[str, Wishes, str]] = {
    "target": ("nomad", Wishes(), "unknown target 'nomad'. Use one of triton, kserve"),
    "engine": ("podman", Wishes(engine="tgi"), "--engine: unknown value 'tgi'. Use auto, transformers"),
    "transformers": ("podman", Wishes(engine="transformers"), "transformers has no server for this target"),
    "llamacpp": ("podman", Wishes(engine="llamacpp"), "llama.cpp reads GGUF files. Run `halfbyte convert"),
    "no storage": ("kserve", Wishes(), "a cluster cannot read a folder of this machine. Say where"),
    "bad storage": ("kserve", Wishes(storage="ftp://x/y"), "is no place that kserve takes weights from. Use oci://"),
    "s3": ("kubernetes", Wishes(storage="s3://x/y"), "is no place that kubernetes takes weights from"),
    "odd storage": ("kserve", Wishes(storage='pvc://x/"y'), "is no place that kserve takes weights from"),
    "storage here": ("podman", Wishes(storage=PVC), "podman takes the weights from this machine. Leave it out"),
    "nodes": ("kubernetes", Wishes(storage=PVC, nodes=2), "kubernetes runs on one node"),
    "nodes without pvc": ("kserve", Wishes(storage="hf://a/b", nodes=2), "several nodes read one volume. Use pvc://"),
    "nodes and replicas": ("kserve", Wishes(storage=PVC, nodes=2, replicas=2), "cannot be replicated by KServe"),
    "gpus": ("podman", Wishes(gpus=-1), "--gpus: is -1. Use 0 or more"),
    "port": ("podman", Wishes(port=80), "--port: is 80. Use 1024 to 65535"),
    "host": ("podman", Wishes(host="example.org"), "--host: 'example.org' is no IP address"),
    "host elsewhere": ("kserve", Wishes(storage=PVC, host="0.0.0.0"), "kserve does not publish an address itself"),
    "image": ("podman", Wishes(image="x; rm -rf"), "--image: 'x; rm -rf' is no image's name"),
    "context": ("podman", Wishes(max_model_len=10**9), "tokens are more than the"),
    "mode": ("kserve", Wishes(storage=PVC, mode="serverless"), "--mode: unknown value 'serverless'. Use standard, raw"),
    "ilab port": ("rhel-ai", Wishes(port=9000), "ilab listens on 8000"),
    "ilab cpu": ("rhel-ai", Wishes(gpus=0), "RHEL AI serves on GPUs"),
    "weights": ("triton", Wishes(weights="symlink"), "--weights: unknown value 'symlink'. Use copy, link, none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(ferry: Path, tmp_path: Path, case: str) -> None:
    target, wishes, words = BAD[case]
    with pytest.raises(HalfbyteError) as caught:
        halfbyte.deploy(target, ferry, tmp_path / "out", wishes=wishes)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_engines_that_are_chosen(deployed: Deploy, ferry: Path, ferry_gguf: Path, tmp_path: Path) -> None:
    awq = tmp_path / "awq"
    halfbyte.convert(ferry, awq, to="awq", allow_requantize=True)
    for source, engine in ((ferry, "transformers"), (ferry_gguf, "llamacpp"), (awq, "vllm")):
        folder = deployed("triton", source, weights="none")
        assert (folder / f"model_repository/{NAME}_stream/1/{engine}_engine.py").exists()
    empty = deployed("triton", ferry, engine="llamacpp", weights="none")
    assert list((empty / f"model_repository/{NAME}_stream/checkpoint").iterdir()) == []
    with pytest.raises(UsageError, match=r"--storage: llama.cpp is given a file.* Use oci:// or pvc://"):
        deployed("kubernetes", ferry_gguf, storage="hf://org/repo", gpus=0)
    with pytest.raises(UsageError, match="transformers needs further packages for awq checkpoints"):
        deployed("triton", awq, engine="transformers")


def test_all_problems_are_said_at_once(ferry: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="4 problems"):
        halfbyte.deploy("kserve", ferry, tmp_path / "out", wishes=Wishes(gpus=-1, port=1, mode="x"))


def test_bad_checkpoints(ferry: Path, ferry_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        halfbyte.deploy("podman", tmp_path / "nowhere", tmp_path / "out")
    broken = shutil.copytree(ferry, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(CheckpointError, match=r"has no quantization_config \(no engine can load that\)"):
        halfbyte.deploy("podman", broken, tmp_path / "out")
    with pytest.raises(UsageError, match="vllm does not serve GGUF files well"):
        halfbyte.deploy("podman", ferry_gguf, tmp_path / "out", wishes=Wishes(engine="vllm"))
    with pytest.raises(CheckpointError, match="control characters"):
        open_subject("a\nb")
    assert not (tmp_path / "out").exists()


def test_the_folder_appears_whole_or_not_at_all(ferry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sub" / "out"
    halfbyte.deploy("podman", ferry, out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(OutputError, match="exists already"):
        halfbyte.deploy("compose", ferry, out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_place", full)
    with pytest.raises(OutputError, match="the disk is full"):
        halfbyte.deploy("triton", ferry, tmp_path / "sub" / "second")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_place", stopped)
    with pytest.raises(KeyboardInterrupt):
        halfbyte.deploy("triton", ferry, tmp_path / "sub" / "second")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out"]


def test_equal_calls_write_equal_files(deployed: Deploy) -> None:
    for target in TARGETS:
        first, second = deployed(target), deployed(target)
        for file in first.rglob("*"):
            if file.is_file():
                assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file
                assert file.stat().st_mode & 0o044 == 0o044, file


# The command


def test_command(ferry: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = CliRunner().invoke(command, ["podman", str(ferry), "-o", str(out), "--gpus", "2", "--json"])
    assert ran.exit_code == 0, ran.output
    record = from_plain(DeployRecord, json.loads(ran.stdout))
    assert (record.target, record.name, record.engine, record.port) == ("podman", "ferry-1b-w4a16", "vllm", 8000)
    assert set(record.files) == {f.name for f in out.iterdir()}
    told = CliRunner().invoke(command, ["compose", str(ferry), "-o", str(tmp_path / "second")])
    assert told.exit_code == 0
    assert "gpu memory: " in told.output
    assert f"next: {tmp_path / 'second'}/README.md" in told.output
