"""podman: a command, a quadlet unit for systemd, and a Containerfile that puts the weights into an image."""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.deployment.machine import values
from halfbyte.deployment.options import Options
from halfbyte.deployment.render import render_all
from halfbyte.deployment.subject import Subject
from halfbyte.records import Estimate


def files(subject: Subject, options: Options, estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """Everything by file name."""
    listed = [
        ("run.sh.j2", "run.sh"),
        ("quadlet.container.j2", f"{options.name}.container"),
        ("Containerfile.j2", "Containerfile"),
        ("README.md.j2", "README.md"),
    ]
    return render_all(
        [(f"podman/{template}", file) for template, file in listed],
        subject,
        options,
        estimates,
        **values(subject, options),
    )
