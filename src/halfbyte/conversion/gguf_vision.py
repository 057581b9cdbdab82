"""Vision towers and projectors in llama.cpp's terms (``mmproj``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.conversion.gguf_families import Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    metadata: Metadata
    float32: frozenset[str] = frozenset()

    def place(self, name: str) -> str | None:
        return None

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def vision_of(config: Any, files: Mapping[str, bytes]) -> Vision | None:
    return None
