"""For an environment whose torchvision has no compiled operators for its torch: lets it be imported all the same.

``envs/make.sh`` copies this file into such an environment, with a ``.pth`` file that imports it at the start of every
Python there. When torchvision is imported, the two operators that its import looks up are declared first; its
transforms, all that vLLM needs of it, then work. Nothing is imported before.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class DeclareOperators(MetaPathFinder):
    """Finds nothing; hears that torchvision is about to be found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, DeclareOperators())
