"""Networks of timm under the monitor, unchanged: λ of each sample, traces, and no adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import reference
from tests.models.reference import NUM_CLASSES, Validated, check_traces, double, monitored, spectral_norms

timm = pytest.importorskip("timm", reason="timm is not installed; `make test-models` installs it")

NETWORKS: dict[str, tuple[dict[str, Any], int]] = {  # options that make them small, and the side of their images
    "resnet18": ({}, 32),
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}, 32),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 56, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
        56,
    ),
    "deit_tiny_distilled_patch16_224": (
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        32,
    ),
    "efficientnet_b0": ({}, 32),
    "levit_128s": (
        {"img_size": 64, "embed_dim": (16, 24, 32), "num_heads": (1, 2, 2), "depth": (1, 1, 1), "key_dim": 8},
        64,
    ),
    "tiny_vit_5m_224": (
        {
            "embed_dims": (8, 16, 16, 24),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 1, 2, 2),
            "window_sizes": (2, 2, 2, 2),
        },
        64,
    ),
    "xcit_nano_12_p16_224": ({"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}, 32),
}


def built(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network with statistics as after training, and images with labels."""
    options, side = NETWORKS[name]
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=NUM_CLASSES, **options)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None  # noqa: PT018
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 1.5)
    return network, torch.rand(6, 3, side, side), torch.arange(6) % NUM_CLASSES


@pytest.mark.filterwarnings("ignore:.*is not reliable")  # WCI of random weights
@pytest.mark.filterwarnings("ignore:.*parameters.*")
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_measured_as_it_is(tmp_path: Path, name: str) -> None:
    network, x, y = built(name)
    monitor = monitored(Validated(network), list(zip(x, y, strict=True)), tmp_path)
    found = monitor.per_sample["robust/fim_spectral_norm"].double()
    torch.testing.assert_close(found, spectral_norms(double(network), x.double()), rtol=1e-5, atol=0)
    check_traces(network.eval(), lambda copied: copied(x.double()), x, y)


def test_the_references_see_every_sample_for_itself() -> None:
    network, x, _ = built("convnext_atto")
    apart = [spectral_norms(reference.double(network), row[None].double()) for row in x]
    torch.testing.assert_close(torch.cat(apart), spectral_norms(reference.double(network), x.double()))
