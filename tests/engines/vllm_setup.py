"""What has to be so before vLLM is imported; import this module first.

Offline, in this process, in one thread, in little memory. torchvision from an index
without CPU builds fails at its import because its compiled operators want CUDA; vLLM needs its transforms alone, so the
operators that the import looks up are declared where they are missing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",  # tiny models gain nothing from threads
    VLLM_LOGGING_LEVEL="WARNING",
    # DeepSeek: vLLM's CPU int8 product keeps no weight that its latent attention could take apart.
    VLLM_MLA_DISABLE="1",
)

import torch


def declare_missing_operators() -> None:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_missing_operators()

from vllm.model_executor.models import registry


def here(function: Callable[[], T]) -> T:
    """vLLM asks each new model class for its abilities in a process of its own, for the sake of CUDA; here is none."""
    return function()


registry._run_in_subprocess = here
