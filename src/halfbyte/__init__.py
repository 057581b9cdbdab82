"""halfbyte: make a language model small, prove that it is still good, and put it into service.

``halfbyte.quantize``, ``halfbyte.plan``, ``halfbyte.verify``, ``halfbyte.compare``, ``halfbyte.evaluate`` (``eval``),
``halfbyte.convert``, ``halfbyte.deploy`` and ``halfbyte.inspect`` are the Python face of the commands of the same
names; ``halfbyte.load`` gives a checkpoint as a dense transformers model. They are imported when first used, so
``import halfbyte`` is instant.
"""

from __future__ import annotations

from typing import Any

_PUBLIC = {
    "quantize": "halfbyte.pipeline",
    "plan": "halfbyte.planner",
    "verify": "halfbyte.verifier",
    "compare": "halfbyte.evaluation.divergence",
    "evaluate": "halfbyte.evaluation.run",
    "convert": "halfbyte.conversion.run",
    "deploy": "halfbyte.deployment.run",
    "inspect": "halfbyte.inspection",
    "load": "halfbyte.loading",
}
__all__ = ["compare", "convert", "deploy", "evaluate", "inspect", "load", "plan", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
