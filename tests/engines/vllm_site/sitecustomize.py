"""On PYTHONPATH of vLLM's server, for it and the processes that it starts: torchvision from an index without CPU builds
fails at its import because its compiled operators want CUDA. vLLM needs its transforms alone, so the operators that the
import looks up are declared."""

from __future__ import annotations

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
