"""Plain Kubernetes: a Deployment and a Service, no operator, no chart."""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.deployment.memory import HEADROOM, gib, shared_bytes
from halfbyte.deployment.options import Options
from halfbyte.deployment.render import render_all
from halfbyte.deployment.server import CACHE_PATH, MODEL_PATH, server_of
from halfbyte.deployment.subject import Subject
from halfbyte.records import Estimate


def files(subject: Subject, options: Options, estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """The manifests and a README."""
    scheme, _, rest = (options.storage or "").partition("://")
    claim, _, path = rest.partition("/")
    return render_all(
        [(f"kubernetes/{f}.j2", f) for f in ("deployment.yaml", "service.yaml", "README.md")],
        subject,
        options,
        estimates,
        server=server_of(subject, options, model=rest if scheme == "hf" else MODEL_PATH),
        scheme=scheme,
        place=rest,
        claim=claim,
        claim_path=path,
        model_path=MODEL_PATH,
        cache_path=CACHE_PATH,
        weights_gib=gib(subject.weights_bytes, HEADROOM),
        memory_gib=gib(estimates["memory"].value, HEADROOM),
        request_gib=gib(estimates["memory"].value),
        shared_gib=gib(shared_bytes(options)),
    )
