"""Templates -> text. A name that a template uses and nobody has given is an error, not an empty string."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from halfbyte.deployment.options import Options
from halfbyte.deployment.subject import Subject
from halfbyte.records import Estimate


def environment() -> Environment:
    """Jinja with the filters ``quote`` (a YAML or JSON scalar), ``shell`` (one word of a shell) and ``gb``."""
    made = Environment(
        loader=PackageLoader("halfbyte.deployment"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "quote": lambda value: json.dumps(value, ensure_ascii=False),
        "shell": lambda value: shlex.quote(str(value)),
        "gb": lambda value: f"{value / 1e9:.2f} GB",
    }
    return made


def render_all(
    templates: Iterable[tuple[str, str]],
    subject: Subject,
    options: Options,
    estimates: Mapping[str, Estimate],
    **values: Any,
) -> dict[str, str]:
    """Render ``(template, file)`` pairs; returns text by file name, relative to the output folder."""
    jinja = environment()
    known: dict[str, Any] = {
        "subject": subject,
        "options": options,
        "name": options.name,
        "estimates": estimates,
        "halfbyte_version": version("halfbyte"),
    }
    return {file: jinja.get_template(template).render(known | values) for template, file in templates}
