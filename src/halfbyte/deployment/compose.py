"""compose: one service, for `docker compose` and `podman compose`."""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.deployment.machine import values
from halfbyte.deployment.options import Options
from halfbyte.deployment.render import render_all
from halfbyte.deployment.subject import Subject
from halfbyte.records import Estimate


def files(subject: Subject, options: Options, estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """Everything by file name."""
    listed = [("compose.yaml.j2", "compose.yaml"), ("README.md.j2", "README.md")]
    return render_all(
        [(f"compose/{template}", file) for template, file in listed],
        subject,
        options,
        estimates,
        **values(subject, options),
    )
