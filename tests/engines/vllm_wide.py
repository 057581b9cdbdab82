"""Packed weights of 8 bits for vLLM on a CPU, computed by torch.

vLLM 0.32's kernel for packed weights takes 4 bits alone on CPUs, so a checkpoint of mixed precision does not start
there. Everything else of it runs: config, schemes, fused layers, loader, unpacking. So that the tests can tell whether
all of these find every Linear's codes and scales, :func:`kernel` adds a plain matrix product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.functional import linear
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types


class WideKernel(MPLinearKernel):
    """``s (q - 128) x`` in float32, for weights that compressed-tensors packed by rows."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return (True, None) if c.weight_type == scalar_types.uint8b128 else (False, "it is for 8 bits")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scales, _ = self._get_weight_params(layer)
        codes = unpack_quantized_values_into_int32(packed.data, self.config.weight_type, 1) - 128
        grouped = codes.unflatten(1, (scales.shape[1], -1)) * scales.data.float().unsqueeze(-1)
        layer.dequantised = grouped.flatten(1)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x.float(), layer.dequantised, None if bias is None else bias.float()).to(x.dtype)


@contextlib.contextmanager
def kernel() -> Iterator[None]:
    """Within, vLLM has it, after its own."""
    known = kernels._POSSIBLE_KERNELS[current_platform._enum]
    known.append(WideKernel)
    try:
        yield
    finally:
        known.remove(WideKernel)
