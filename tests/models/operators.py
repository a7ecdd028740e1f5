"""A pytest plugin: lets torchvision load beside a CPU build of torch, by declaring the operators that it describes.

The index's torchvision is built for CUDA. torchmetrics imports it where it is installed, so this comes first:
``python -m pytest -p tests.models.operators``.
"""

import importlib.util

import torch

DECLARED = torch.library.Library("torchvision", "DEF")  # declarations last as long as this
for _name in ("nms", "qnms") if importlib.util.find_spec("torchvision") else ():
    DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
