"""What ``deploy`` writes for KServe and Kubernetes, held against the schemas and in itself."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from conftest import Deploy
from deployments import NAME, PVC, manifest, options_of

CRDS = Path(os.environ.get("HALFBYTE_KSERVE_CRDS") or Path(__file__).parents[1] / "../shared/data/kserve")


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
def test_gguf_is_served_by_llamacpp(deployed: Deploy, ferry_gguf: Path, target: str) -> None:
    folder = deployed(target, ferry_gguf, gpus=0, port=9000)
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
