"""Red Hat Enterprise Linux AI: three scripts around ``ilab model``: get the weights, serve, chat."""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.deployment.memory import GPU_SHARE
from halfbyte.deployment.options import Options
from halfbyte.deployment.render import render_all
from halfbyte.deployment.subject import Subject
from halfbyte.records import Estimate

# Where ilab keeps models, unless --model-dir says otherwise.
MODELS = "~/.cache/instructlab/models"


def files(subject: Subject, options: Options, estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """Scripts and a README."""
    scheme, _, place = (options.storage or "").partition("://")
    # ilab files models under their repository's name: org/name of a hub, the last part of an image's name
    last = place.rpartition("/")[2].partition(":")[0]
    kept = place if scheme == "hf" else last if scheme == "docker" else options.name
    return render_all(
        [(f"rhel_ai/{f}.j2", f) for f in ("get.sh", "serve.sh", "chat.sh", "README.md")],
        subject,
        options,
        estimates,
        scheme=scheme,
        repository=place if scheme == "hf" else options.storage,
        folder=str(subject.folder) if subject.folder else "",
        models=MODELS,
        kept=kept,
        share=GPU_SHARE,
        url=f"http://localhost:{options.port}",
    )
