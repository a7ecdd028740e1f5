"""How keys are built, which can be logged together, and which name an accuracy."""

import pytest

from lightning_robust.metrics.keys import (
    accuracy_key,
    clean_accuracy_key,
    has_renamed_characters,
    is_accuracy,
    is_accuracy_at_epsilon,
    is_error_bar,
    leaves_and_folders,
    parameter_names_in_keys,
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
def test_other_words_do_not_name_an_accuracy(key: str) -> None:
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
def test_otherwise_a_validation_accuracy_of_the_user_is_chosen(key: str) -> None:
    perturbed = ["val_adv_acc", "val_pgd_accuracy", "val_acc_robust", "val_noise/acc"]
    others = ["val_loss", "train_acc", "val_acc_step", "val_acc/dataloader_idx_1"]
    assert clean_accuracy_key([*perturbed, *others, key, f"val_longer_{key}"], prefixes=[]) == key
    assert clean_accuracy_key([*perturbed, *others], prefixes=["robust/"]) is None


def test_names_of_parameters_end_keys_without_folders_or_odd_characters_and_stay_different() -> None:
    names = ["a", "a.b", "a/b", "a_b", "a b(1)", "größe", "a\nb"]
    found = parameter_names_in_keys(names)
    assert found[:2] == names[:2]
    assert found[5] == names[5]
    assert len(set(found)) == len(names)
    assert not any("/" in name or has_renamed_characters(name) for name in found)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["a", "a_b/c", "a.b", "b/a", "b/c"], []),
        (["a/b", "x", "a/b/c"], [("a/b", "a/b/c")]),
        (["a/b/c/d", "a", "a/b"], [("a", "a/b"), ("a", "a/b/c/d"), ("a/b", "a/b/c/d")]),
    ],
)
def test_a_key_that_is_the_folder_of_another_is_found(keys: list[str], expected: list[tuple[str, str]]) -> None:
    assert list(leaves_and_folders(keys)) == list(leaves_and_folders(keys[::-1])) == expected
