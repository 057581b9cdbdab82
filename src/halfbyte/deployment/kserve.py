"""KServe and OpenShift AI: a ServingRuntime that says how to serve, an InferenceService that says what.

Several GPUs of a node are ``--tensor-parallel-size``; several nodes are a Ray cluster of a head and workers, which
KServe starts from ``workerSpec``. Schemas: serving.kserve.io v1alpha1 and v1beta1.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.deployment.memory import HEADROOM, gib, shared_bytes
from halfbyte.deployment.options import Options
from halfbyte.deployment.render import render_all
from halfbyte.deployment.server import server_of
from halfbyte.deployment.subject import Subject
from halfbyte.records import Estimate

RAY_PORT = 6379
# The format by which service and runtime find each other.
FORMATS = {"vllm": "vLLM", "llamacpp": "gguf"}


def files(subject: Subject, options: Options, estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """The two manifests, a Containerfile for weights in an OCI image, and a README."""
    listed = [("servingruntime.yaml", "servingruntime.yaml"), ("inferenceservice.yaml", "inferenceservice.yaml")]
    listed.append(("README.md", "README.md"))
    if options.storage is not None and options.storage.startswith("oci://"):
        listed.append(("Containerfile.modelcar", "Containerfile.modelcar"))
    return render_all(
        [(f"kserve/{template}.j2", file) for template, file in listed],
        subject,
        options,
        estimates,
        server=server_of(subject, options, served="{{.Name}}"),
        runtime=f"{options.name}-{options.engine}",
        model_format=FORMATS[options.engine],
        deployment_mode={"standard": "Standard", "raw": "RawDeployment"}[options.mode],
        memory_gib=gib(estimates["memory"].value, HEADROOM),
        request_gib=gib(estimates["memory"].value),
        shared_gib=gib(shared_bytes(options)),
        ray_port=RAY_PORT,
    )
