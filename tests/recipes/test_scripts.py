"""The scripts run, and their results are those that they announce."""

import sys
from pathlib import Path

import pytest
import torch

from recipes import standard_vs_adversarial as recipe
from recipes.benchmarks import linearize as benchmark_linearize
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
