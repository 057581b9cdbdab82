"""On PYTHONPATH of vLLM's server, for it and the processes that it starts: torchvision from an index without CPU builds
fails at its import because its compiled operators want CUDA. vLLM needs its transforms alone, so the operators that the
import looks up are declared, unless the environment does that by itself."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torchvision_operators") is None:
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
