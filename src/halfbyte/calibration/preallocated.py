"""A key-value cache whose length is known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that writes into a buffer of ``capacity`` positions and hands out views of its filled part."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._key_buffer = self._value_buffer = torch.empty(0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer, self._value_buffer = (
            torch.empty(*s.shape[:2], self._capacity, s.shape[3], dtype=s.dtype, device=s.device)
            for s in (key_states, value_states)
        )
        self.keys, self.values = self._key_buffer[:, :, :0], self._value_buffer[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, heads, new, width]`` states and return all of them so far (the interface of transformers)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values


def preallocated_cache(config: Any, capacity: int) -> Any:
    """The model's cache with every plain layer preallocated for ``capacity`` positions.

    A sliding window that is no shorter than ``capacity`` never slides, so such layers are plain too. Layers of other
    kinds (shorter windows, linear attention) stay as transformers makes them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity)
        if type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= capacity)
        else layer
        for layer in cache.layers
    ]
    return cache
