"""torchvision for tests, also one that was built for another torch than the one here (CI's is for CPUs)."""

import pytest
import torch

try:
    import torchvision
except ImportError:
    pytest.skip("needs the extra `quality`", allow_module_level=True)
except RuntimeError:  # its own operators are missing: two are asked for by name, and no network of the tests has them
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
