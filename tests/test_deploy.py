"""What ``deploy`` writes, read as the programs read it that it is for: parsed, run, and held against each other."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner

import halfbyte
import tiny
from conftest import Models
from halfbyte.cli.deploy import command
from halfbyte.deployment import run, triton
from halfbyte.deployment.memory import cache_bytes
from halfbyte.deployment.options import TARGETS, Wishes
from halfbyte.deployment.subject import name_for, open_subject
from halfbyte.errors import CheckpointError, HalfbyteError, OutputError, UsageError
from halfbyte.records import DeployRecord, from_plain

NAME = "ferry-1b-w4a16"
PVC = "pvc://models/ferry"
# What each target needs besides a checkpoint on this machine.
NEEDED: dict[str, Wishes] = {t: Wishes(storage=PVC) if t in ("kserve", "kubernetes") else Wishes() for t in TARGETS}
CRDS = Path(os.environ.get("HALFBYTE_KSERVE_CRDS") or Path(__file__).parents[1] / "../shared/data/kserve")


@pytest.fixture(scope="module")
def small(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deploy") / "Ferry_1B.w4a16"
    halfbyte.quantize(tiny_model("llama"), out, group_size=32, method="rtn", device="cpu")
    return out


@pytest.fixture(scope="module")
def gguf(small: Path) -> Path:
    out = small.with_name("ferry-gguf")
    halfbyte.convert(small, out, to="gguf")
    return out


Deploy = Callable[..., Path]


@pytest.fixture
def deployed(small: Path, tmp_path: Path) -> Deploy:
    """``deployed("kserve", gpus=2)``: the folder. ``source`` and ``name`` as well."""

    def make(target: str, source: Path | None = None, name: str = NAME, **wishes: Any) -> Path:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        halfbyte.deploy(target, source or small, out, name=name, wishes=replace(NEEDED[target], **wishes))
        return out

    return make


def manifest(folder: Path, file: str) -> Any:
    return yaml.safe_load((folder / file).read_text())


def quadlet(folder: Path) -> dict[str, list[str]]:
    """The [Container] section; keys may occur several times."""
    found: dict[str, list[str]] = {}
    text = (folder / f"{NAME}.container").read_text().partition("[Container]")[2].partition("\n[")[0]
    for line in text.splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def instruction(folder: Path, name: str) -> Any:
    line = next(x for x in (folder / "Containerfile").read_text().splitlines() if x.startswith(f"{name} "))
    value = line.removeprefix(f"{name} ")
    return json.loads(value) if value.startswith("[") else value


def called(folder: Path, script: str, *, path: Path, **environment: str) -> list[list[str]]:
    """What a script calls instead of podman, ilab and rsync, which are replaced by something that notes it."""
    path.mkdir(exist_ok=True)
    notes = path / "calls"
    notes.unlink(missing_ok=True)
    for program in ("podman", "ilab", "rsync"):
        (path / program).write_text(f'#!/bin/bash\nprintf "%s\\0" {program} "$@" >> {notes}\necho >> {notes}\n')
        (path / program).chmod(0o755)
    kept = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(path)} | environment
    done = subprocess.run([folder / script], env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in notes.read_text().split("\0\n")[:-1] for line in [line + "\0"]]


def options_of(arguments: list[str]) -> dict[str, str]:
    """``--key=value`` or ``--key value``."""
    joined = " ".join(arguments)
    return dict(re.findall(r"--([\w-]+)[= ]([^\s]+)", joined))


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
    service = manifest(deployed("compose", host="0.0.0.0"), "compose.yaml")["services"]["server"]
    assert service["environment"]["VLLM_API_KEY"].startswith("${API_KEY:?")
    assert service["ports"] == ["0.0.0.0:8000:8000"]


# Scripts


def test_scripts_are_valid_and_executable(deployed: Deploy) -> None:
    scripts = [f for t in ("podman", "rhel-ai") for f in deployed(t).glob("*.sh")]
    assert len(scripts) == 4
    for script in scripts:
        assert script.stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", script], check=True)


def test_podman_runs_what_the_card_runs(deployed: Deploy, small: Path, tmp_path: Path) -> None:
    argv = called(deployed("podman", gpus=2), "run.sh", path=tmp_path / "bin")[0]
    assert argv[:3] == ["podman", "run", "--rm"]
    assert argv[argv.index("--device") + 1] == "nvidia.com/gpu=all"
    assert f"{small.resolve()}:/mnt/models:ro" in argv
    assert json.loads(next(a for a in argv if a.startswith("--entrypoint=")).partition("=")[2])[:2] == ["python3", "-m"]
    assert "--tensor-parallel-size=2" in argv
    moved = called(deployed("podman"), "run.sh", path=tmp_path / "bin", MODEL_DIR="/else where")[0]
    assert "/else where:/mnt/models:ro" in moved


def test_a_folder_with_odd_characters(deployed: Deploy, small: Path, tmp_path: Path) -> None:
    odd = tmp_path / "it's 50% off"
    shutil.copytree(small, odd)
    folder = deployed("podman", odd)
    assert f"{odd}:/mnt/models:ro" in called(folder, "run.sh", path=tmp_path / "bin")[0]
    assert quadlet(folder)["Volume"] == [f"{odd}:/mnt/models:ro".replace("%", "%%")]
    assert str(odd) in manifest(deployed("compose", odd), "compose.yaml")["services"]["server"]["volumes"][0]["source"]
    rhel = called(deployed("rhel-ai", odd), "get.sh", path=tmp_path / "bin")
    assert rhel[0][-2] == f"{odd}/"
    with pytest.raises(UsageError, match=r"cannot be given a folder with any of"):
        deployed("podman", shutil.copytree(small, tmp_path / "a:b"))


def test_ilab(deployed: Deploy, small: Path, tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    folder = deployed("rhel-ai", gpus=4)
    kept = f"{bin_}/.cache/instructlab/models/{NAME}"
    get = called(folder, "get.sh", path=bin_)
    assert get[0][0] == "rsync"
    assert get[0][-2:] == [f"{small.resolve()}/", f"{kept}/"]
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


# Clusters


@functools.cache
def schema_of(file: str) -> Any:
    """What checks a manifest of a kind. The schemas are large: reading one takes seconds."""
    path = CRDS / file
    if not path.exists():
        pytest.skip(f"KServe's schemas are not here ({CRDS}); HALFBYTE_KSERVE_CRDS names their folder")
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return jsonschema.Draft202012Validator(strict(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    """A schema that refuses what it does not name, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: strict(v) for k, v in schema.items()}
    open_ended = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(made.get("properties"), dict) and not open_ended:
        made["additionalProperties"] = False
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def check_kserve(folder: Path) -> tuple[Any, Any]:
    """Both manifests, valid by KServe's schemas."""
    found = []
    for file, crd in (
        ("servingruntime.yaml", "serving.kserve.io_servingruntimes.yaml"),
        ("inferenceservice.yaml", "serving.kserve.io_inferenceservices.yaml"),
    ):
        content = manifest(folder, file)
        rest = {k: v for k, v in content.items() if k != "metadata"}
        assert set(content["metadata"]) <= {"name", "annotations", "labels"}
        assert all(isinstance(v, str) for k in ("annotations", "labels") for v in content["metadata"][k].values())
        schema_of(crd).validate(rest)
        found.append(content)
    return found[0], found[1]


VARIANTS: dict[str, dict[str, Any]] = {
    "oci": {"storage": "oci://quay.io/me/ferry:1.0"},
    "hf": {"storage": "hf://org/ferry"},
    "s3": {"storage": "s3://bucket/models/ferry"},
    "raw": {"mode": "raw"},
    "several GPUs": {"gpus": 4},
    "several nodes": {"gpus": 8, "nodes": 2},
    "replicas": {"replicas": 3},
    "cpu": {"gpus": 0},
    "digits": {"name": "12345"},
    "a word of YAML": {"name": "null"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kserve(deployed: Deploy, variant: str) -> None:
    wishes = VARIANTS[variant]
    runtime, service = check_kserve(deployed("kserve", **wishes))
    predictor = service["spec"]["predictor"]
    assert service["metadata"]["name"] == wishes.get("name", NAME)
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    assert predictor["model"]["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    assert predictor["model"]["storageUri"] == wishes.get("storage", PVC)
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == (
        "RawDeployment" if variant == "raw" else "Standard"
    )
    gpus = wishes.get("gpus", 1)
    limits = predictor["model"]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (str(gpus) if gpus else None)
    assert ("tolerations" in predictor) == (gpus > 0)
    container = runtime["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": 8080}
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == "8080"
    if variant == "several nodes":
        for place in (predictor, runtime["spec"]):
            assert place["workerSpec"]["pipelineParallelSize"] == 2
            assert place["workerSpec"]["tensorParallelSize"] == 8
        script = container["args"][0]
        subprocess.run(["bash", "-n", "-c", script], check=True)
        subprocess.run(["bash", "-n", "-c", runtime["spec"]["workerSpec"]["containers"][0]["args"][0]], check=True)
        assert "--pipeline-parallel-size=2 --distributed-executor-backend=ray" in script
        assert "minReplicas" not in predictor
    else:
        assert predictor["minReplicas"] == predictor["maxReplicas"] == wishes.get("replicas", 1)
        assert ("--tensor-parallel-size=4" in container["args"]) == (gpus == 4)


FAULTS: dict[str, Callable[[Any, Any], Any]] = {
    "modelFormat without a name": lambda r, s: s["spec"]["predictor"]["model"]["modelFormat"].pop("name"),
    "a misspelt field": lambda r, s: s["spec"]["predictor"].update(minReplica=1),
    "a probe of another form": lambda r, s: r["spec"]["containers"][0]["startupProbe"].update(http={}),
    "a number as text": lambda r, s: s["spec"]["predictor"].update(minReplicas="1"),
    "a container without a name": lambda r, s: r["spec"]["containers"][0].pop("name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_schemas_find_faults(deployed: Deploy, fault: str) -> None:
    runtime, service = copy.deepcopy(check_kserve(deployed("kserve")))
    FAULTS[fault](runtime, service)
    problems = []
    for content, crd in ((runtime, "servingruntimes"), (service, "inferenceservices")):
        rest = {k: v for k, v in content.items() if k != "metadata"}
        problems += list(schema_of(f"serving.kserve.io_{crd}.yaml").iter_errors(rest))
    assert len(problems) == 1


@pytest.mark.parametrize("storage", [PVC, "oci://quay.io/me/ferry:1.0", "hf://org/ferry"])
def test_kubernetes(deployed: Deploy, storage: str) -> None:
    folder = deployed("kubernetes", storage=storage, replicas=2, name="007")
    deployment, service = (manifest(folder, f) for f in ("deployment.yaml", "service.yaml"))
    template = deployment["spec"]["template"]
    assert deployment["metadata"]["name"] == service["metadata"]["name"] == "007"
    assert deployment["spec"]["replicas"] == 2
    labels = template["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    container = template["spec"]["containers"][0]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    assert service["spec"]["ports"][0]["port"] == ports["http"] == 8000
    assert template["metadata"]["annotations"]["prometheus.io/port"] == "8000"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}
    weights = next(v for v in template["spec"]["volumes"] if v["name"] == "weights")
    mount = next(m for m in container["volumeMounts"] if m["name"] == "weights")
    model = options_of(container["args"])["model"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    if storage.startswith("pvc"):
        assert (weights["persistentVolumeClaim"]["claimName"], mount["subPath"]) == ("models", "ferry")
    if storage.startswith("oci"):
        assert weights["image"]["reference"] == "quay.io/me/ferry:1.0"
    if storage.startswith("hf"):
        assert (model, environment["HF_HUB_OFFLINE"], environment["HF_HOME"]) == ("org/ferry", "0", mount["mountPath"])
    else:
        assert (model, environment["HF_HUB_OFFLINE"], mount["mountPath"]) == ("/mnt/models", "1", "/mnt/models")


@pytest.mark.parametrize("target", ["podman", "compose", "kubernetes", "kserve"])
def test_gguf_is_served_by_llamacpp(deployed: Deploy, gguf: Path, target: str) -> None:
    folder = deployed(target, gguf, gpus=0, port=9000)
    text = "".join(f.read_text() for f in folder.iterdir())
    assert "ghcr.io/ggml-org/llama.cpp:server" in text
    assert "--model=/mnt/models/model.gguf" in text
    assert "vllm" not in text.lower()
    assert "nvidia" not in text
    assert ":9000" in text
    if target == "kserve":
        check_kserve(folder)
    if target == "compose":
        assert "environment" not in manifest(folder, "compose.yaml")["services"]["server"]


# Triton's repositories (the real server is asked in tests/engines/test_triton.py)


def test_triton_repository(deployed: Deploy, small: Path) -> None:
    folder = deployed("triton", gpus=2, trace=True, max_batch=5)
    front, stream = (
        triton.parse_config((folder / f"model_repository/{n}/config.pbtxt").read_text())
        for n in (NAME, f"{NAME}_stream")
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
    assert (placed / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {f.name for f in placed.iterdir()}
    assert {p["key"]: p["value"]["string_value"] for p in front["parameters"]}["engine_model"] == stream["name"]
    vllm = json.loads((folder / f"vllm_repository/{NAME}/1/model.json").read_text())
    assert (vllm["model"], vllm["tensor_parallel_size"]) == ("/mnt/models", 2)
    backend = triton.parse_config((folder / f"vllm_repository/{NAME}/config.pbtxt").read_text())
    assert (backend["backend"], backend["name"]) == ("vllm", NAME)
    engines = {f.name for f in (folder / f"model_repository/{NAME}_stream/1").glob("*_engine.py")}
    assert engines == {"transformers_engine.py"}
    for file in (folder / "model_repository").rglob("*.py"):
        compile(file.read_text(), file, "exec")


def test_triton_with_llamacpp_has_a_gguf(deployed: Deploy, gguf: Path) -> None:
    for source in (None, gguf):
        folder = deployed("triton", source, engine="llamacpp", gpus=0)
        placed = folder / f"model_repository/{NAME}_stream/checkpoint"
        assert (placed / "model.gguf").stat().st_size > 0
        assert "xllamacpp" in (folder / "requirements.txt").read_text()


def test_weights_may_be_linked_or_left_out(deployed: Deploy, small: Path) -> None:
    linked = deployed("triton", weights="link") / f"model_repository/{NAME}_stream/checkpoint/model.safetensors"
    assert linked.stat().st_ino == (small / "model.safetensors").stat().st_ino
    assert list((deployed("triton", weights="none") / f"model_repository/{NAME}_stream/checkpoint").iterdir()) == []


def test_parse_config_refuses_what_is_broken() -> None:
    for text in ("a {", "a [ 1", "}", "a:"):
        with pytest.raises(ValueError, match=r"."):
            triton.parse_config(text)


# Memory


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_the_cache_is_as_large_as_transformers_makes_it(tiny_model: Models, family: str) -> None:
    """The oracle is transformers' own cache, filled."""
    folder = tiny_model(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = 40
    with torch.inference_mode():
        out = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True)
    held = 0
    for layer, kind in zip(out.past_key_values.layers, layer_kinds(model.config), strict=True):
        window = int(model.config.sliding_window) if kind == "sliding_attention" else tokens
        for tensor in (layer.keys, layer.values):
            kept = min(window, tokens)
            assert tensor.shape[-2] in (kept, kept - 1)  # of a window, transformers drops what the next token ends
            held += tensor.nbytes // tensor.shape[-2] * kept
    assert cache_bytes(tiny.config_of(folder), tokens) == held


def layer_kinds(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None):
        assert config.model_type == "mistral"
        return ["sliding_attention"] * config.num_hidden_layers
    return kinds or ["full_attention"] * config.num_hidden_layers


def test_latent_attention_is_counted_once() -> None:
    """DeepSeek-V3: 61 layers of 512 + 64 elements."""
    config = {"num_hidden_layers": 61, "num_attention_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512}
    assert cache_bytes(config | {"qk_rope_head_dim": 64}, 1000) == 2 * 61 * 576 * 1000


def test_figures_in_the_files_are_those_of_the_record(small: Path, tmp_path: Path) -> None:
    record = halfbyte.deploy("kserve", small, tmp_path / "out", wishes=replace(NEEDED["kserve"], gpus=2, sequences=3))
    for estimate in record.estimates.values():
        assert estimate.value == pytest.approx(sum(estimate.parts.values()))
    resources = manifest(tmp_path / "out", "inferenceservice.yaml")["spec"]["predictor"]["model"]["resources"]
    requested = int(resources["requests"]["memory"].removesuffix("Gi")) << 30
    assert 0 <= requested - record.estimates["memory"].value < 1 << 30
    assert int(resources["limits"]["memory"].removesuffix("Gi")) << 30 >= 1.25 * record.estimates["memory"].value
    readme = (tmp_path / "out" / "README.md").read_text()
    for estimate in record.estimates.values():
        assert f"{estimate.value / 1e9:.2f} GB" in readme
    weights = sum(f.stat().st_size for f in small.glob("*.safetensors"))
    parts = record.estimates["gpu_memory"].parts
    assert parts["weights, one of 2 parts"] == pytest.approx(weights / 2, rel=0.05)


def test_what_does_not_fit_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--gpu-memory: each of 1 GPUs would need .* Use --gpus \d+, a shorter"):
        halfbyte.deploy("podman", small, tmp_path / "out", wishes=Wishes(gpu_memory_gb=1e-4))
    halfbyte.deploy("podman", small, tmp_path / "out", wishes=Wishes(gpu_memory_gb=80.0))


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
def test_bad_options(small: Path, tmp_path: Path, case: str) -> None:
    target, wishes, words = BAD[case]
    with pytest.raises(HalfbyteError) as caught:
        halfbyte.deploy(target, small, tmp_path / "out", wishes=wishes)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_engines_that_are_chosen(deployed: Deploy, small: Path, gguf: Path, tmp_path: Path) -> None:
    awq = tmp_path / "awq"
    halfbyte.convert(small, awq, to="awq", allow_requantize=True)
    for source, engine in ((small, "transformers"), (gguf, "llamacpp"), (awq, "vllm")):
        folder = deployed("triton", source, weights="none")
        assert (folder / f"model_repository/{NAME}_stream/1/{engine}_engine.py").exists()
    with pytest.raises(UsageError, match="transformers needs further packages for awq checkpoints"):
        deployed("triton", awq, engine="transformers")


def test_all_problems_are_said_at_once(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="4 problems"):
        halfbyte.deploy("kserve", small, tmp_path / "out", wishes=Wishes(gpus=-1, port=1, mode="x"))


def test_bad_checkpoints(small: Path, gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        halfbyte.deploy("podman", tmp_path / "nowhere", tmp_path / "out")
    broken = shutil.copytree(small, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(CheckpointError, match=r"has no quantization_config \(no engine can load that\)"):
        halfbyte.deploy("podman", broken, tmp_path / "out")
    with pytest.raises(UsageError, match="vllm does not serve GGUF files well"):
        halfbyte.deploy("podman", gguf, tmp_path / "out", wishes=Wishes(engine="vllm"))
    with pytest.raises(CheckpointError, match="control characters"):
        open_subject("a\nb")
    assert not (tmp_path / "out").exists()


def test_the_folder_appears_whole_or_not_at_all(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sub" / "out"
    halfbyte.deploy("podman", small, out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(OutputError, match="exists already"):
        halfbyte.deploy("compose", small, out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_place", full)
    with pytest.raises(OutputError, match="the disk is full"):
        halfbyte.deploy("triton", small, tmp_path / "sub" / "second")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_place", stopped)
    with pytest.raises(KeyboardInterrupt):
        halfbyte.deploy("triton", small, tmp_path / "sub" / "second")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out"]


def test_equal_calls_write_equal_files(deployed: Deploy) -> None:
    for target in TARGETS:
        first, second = deployed(target), deployed(target)
        for file in first.rglob("*"):
            if file.is_file():
                assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file
                assert file.stat().st_mode & 0o044 == 0o044, file


# The command


def test_command(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = CliRunner().invoke(command, ["podman", str(small), "-o", str(out), "--gpus", "2", "--json"])
    assert ran.exit_code == 0, ran.output
    record = from_plain(DeployRecord, json.loads(ran.stdout))
    assert (record.target, record.name, record.engine, record.port) == ("podman", "ferry-1b-w4a16", "vllm", 8000)
    assert set(record.files) == {f.name for f in out.iterdir()}
    told = CliRunner().invoke(command, ["compose", str(small), "-o", str(tmp_path / "second")])
    assert told.exit_code == 0
    assert "gpu memory: " in told.output
    assert f"next: {tmp_path / 'second'}/README.md" in told.output
