"""The scripts run, and their results are those that they announce."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import standard_vs_adversarial as recipe
from recipes.benchmarks import linearize as benchmark_linearize
from recipes.benchmarks import many_classes as benchmark_many_classes
from recipes.common import imagenet
from recipes.common.digits import DigitsDataModule


@pytest.mark.long
def test_the_monitor_tells_robust_from_accurate_and_predicts_the_attack(tmp_path: Path) -> None:
    probes = {
        name: recipe.validation_probe(recipe.train(epsilon, epochs=8, seed=1), num_samples=500)
        for name, epsilon in (("standard", 0.0), ("adversarial", 0.1))
    }
    standard, adversarial = map(recipe.measure, probes.values())
    assert abs(standard["linearized_accuracy_linf_0"] - adversarial["linearized_accuracy_linf_0"]) < 0.02
    assert adversarial["fim_spectral_norm_upper"] < standard["fim_spectral_norm_lower"]
    assert adversarial["fim_spectral_norm_calibrated"] < 0.8 * standard["fim_spectral_norm_calibrated"]
    for epsilon in recipe.EPSILONS:
        predicted = f"linearized_accuracy_linf_{epsilon:.4g}"
        assert adversarial[predicted] > standard[predicted]
        for values in (standard, adversarial):
            assert abs(values[predicted] - values[f"adversarial_accuracy_linf_{epsilon:.4g}"]) <= 0.06
    assert recipe.table(standard, adversarial).count("±") == 18
    few = {name: recipe.validation_probe(probe.model, num_samples=40) for name, probe in probes.items()}
    recipe.draw(few, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_prints_a_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["benchmark", "--depth", "8", "--batch-size", "3", "--rounds", "2"])
    benchmark_linearize.main()
    torch.set_num_threads(threads)
    assert "ratio: median " in capsys.readouterr().out


def test_the_benchmark_of_many_classes_prints_ratios_for_each_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a network and images of no use, because the real ones are large."""
    network = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 1000)).eval()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(imagenet, "efficientnet_lite0", lambda: network.requires_grad_(False))
    monkeypatch.setattr(imagenet, "photographs", lambda: (images, torch.tensor([7, 3, 7, 900, 3, 1])))
    options = ["--classes", "5", "1000", "--batch-size", "4", "--rounds", "2", "--exact"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    threads = torch.get_num_threads()
    benchmark_many_classes.main()
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert said.count("both, as the monitor takes them  median ") == 2
    assert "1000 classes, 4 photographs" in said
    assert said.count("256 samples of an epoch of ImageNet") == 2
    assert said.count("share of it that is found  least") == 2
    monkeypatch.setattr(sys, "argv", ["benchmark", "--classes", "2"])
    with pytest.raises(ValueError, match="--classes of at least 4, those of the photographs, but got 2"):
        benchmark_many_classes.main()
    torch.set_num_threads(threads)


def test_photographs_come_from_scikit_learn_where_there_is_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(imagenet, "DATA", tmp_path)
    images, classes = imagenet.photographs()
    assert images.shape == (2, 3, 224, 224)
    assert classes is None
    assert 0 <= float(images.min()) < 0.2
    assert 0.8 < float(images.max()) <= 1
    np.savez(tmp_path / imagenet.PHOTOGRAPHS, x=np.full((3, 224, 224, 3), 51, dtype=np.uint8), y=np.arange(3))
    images, classes = imagenet.photographs()
    assert torch.equal(images, torch.full((3, 3, 224, 224), 0.2))
    assert torch.equal(classes, torch.arange(3))


def test_the_split_of_the_digits_does_not_depend_on_the_number_of_training_images() -> None:
    few, all_of_them = DigitsDataModule(num_train=50), DigitsDataModule()
    for data in (few, all_of_them):
        data.setup("fit")
    assert (len(few.train_set), len(all_of_them.train_set), len(few.val_set)) == (50, 1297, 500)
    assert torch.equal(few.val_set.tensors[0], all_of_them.val_set.tensors[0])
    assert torch.equal(few.train_set.tensors[0], all_of_them.train_set.tensors[0][:50])
    images, labels = all_of_them.val_set.tensors
    assert images.shape == (500, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert torch.bincount(labels).min() > 35


def test_an_impossible_number_of_training_images_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_train` to lie between 1 and 1297, but got 0"):
        DigitsDataModule(num_train=0)
