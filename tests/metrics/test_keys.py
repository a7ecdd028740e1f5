"""Which of the logged keys name an accuracy, and which one is that of clean accuracy."""

import pytest

from lightning_robust.metrics.keys import (
    accuracy_key,
    clean_accuracy_key,
    is_accuracy,
    is_accuracy_at_epsilon,
    is_error_bar,
)

PREFIXES = ["robust/", "robust_l2/val.", "(r+)[0]*^$|\\d?/"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 8 / 255, 2.0, 1e30])
@pytest.mark.parametrize("kind", ["linearized", "linearized_order2", "adversarial"])
def test_an_accuracy_at_a_perturbation_size_is_recognised(prefix: str, epsilon: float, kind: str) -> None:
    key = prefix + accuracy_key(kind, "linf", epsilon)
    assert is_accuracy(key)
    assert is_accuracy_at_epsilon(key, prefix=prefix)
    assert not is_accuracy_at_epsilon(f"{key}_stderr", prefix=prefix)
    assert not is_accuracy_at_epsilon(key, prefix="other/")


@pytest.mark.parametrize("key", ["val_acc", "valAcc", "ACC", "accuracy", "top1_acc", "val_accuracy_epoch"])
def test_a_word_that_begins_with_acc_names_an_accuracy(key: str) -> None:
    assert is_accuracy(key)


@pytest.mark.parametrize("key", ["val_loss", "vaccine", "accelerator/power", "grad_accumulation", "acceptance_rate"])
def test_other_words_name_none(key: str) -> None:
    assert not is_accuracy(key)


@pytest.mark.parametrize("ending", ["stderr", "lower", "upper", "stderr_probes"])
def test_error_bars_are_recognised(ending: str) -> None:
    assert is_error_bar(f"robust/wci_{ending}")
    assert not is_error_bar(f"robust/{ending}_wci")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_clean_accuracy_on_the_measured_samples_comes_first(prefix: str) -> None:
    ours = [prefix + accuracy_key("linearized", "l2", epsilon) for epsilon in (0.1, 0.0)]
    assert clean_accuracy_key(["val_acc", *ours], prefixes=["none/", prefix]) == ours[1]
    assert clean_accuracy_key([*ours, "val_acc"], prefixes=["none/"]) == "val_acc"


@pytest.mark.parametrize(
    "key",
    ["val_acc", "val/accuracy", "valid_top1_acc", "validation/Accuracy", "val_acc/dataloader_idx_0", "my/val_acc"],
)
def test_without_it_a_validation_accuracy_of_the_user_is_taken(key: str) -> None:
    perturbed = ["val_adv_acc", "val_pgd_accuracy", "val_acc_robust", "val_noise/acc"]
    others = ["val_loss", "train_acc", "val_acc_step", "val_acc/dataloader_idx_1"]
    assert clean_accuracy_key([*perturbed, *others, key, f"val_longer_{key}"], prefixes=[]) == key
    assert clean_accuracy_key([*perturbed, *others], prefixes=["robust/"]) is None
