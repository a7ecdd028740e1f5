"""Covariances of measurements on the same samples, compared with sample covariances."""

import math

import pytest
import torch
from torch import Tensor

from lightning_robust.functional.drift._pairing import covariances


def found(num_measurements: int, num_samples: int, *, shared: float = 1.0, seed: int = 0) -> Tensor:
    """Values per sample of several measurements; some samples are easy in all of them."""
    generator = torch.Generator().manual_seed(seed)
    easy = shared * torch.randn(num_samples, generator=generator, dtype=torch.float64)
    return easy + torch.randn(num_measurements, num_samples, generator=generator, dtype=torch.float64)


def errors(values: Tensor) -> list[float]:
    return (values.std(dim=1) / math.sqrt(values.shape[1])).tolist()


def test_covariances_are_the_sample_covariances_of_the_means() -> None:
    values = found(6, 30)
    computed = covariances(errors(values), list(values))
    torch.testing.assert_close(computed, torch.cov(values) / 30)


def test_the_error_of_a_difference_is_that_of_the_paired_differences() -> None:
    values = found(5, 40, shared=3.0)
    computed = covariances(errors(values), list(values))
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25, -1.0], dtype=torch.float64)
    paired = (weights @ values).std() / math.sqrt(40)
    torch.testing.assert_close((weights @ computed @ weights).sqrt(), paired)
    assert paired < 0.5 * (weights.square() @ computed.diagonal()).sqrt()


def test_errors_that_are_reported_larger_keep_their_correlations() -> None:
    values = found(3, 30)
    factors = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    reported = (factors * torch.tensor(errors(values), dtype=torch.float64)).tolist()
    torch.testing.assert_close(
        covariances(reported, list(values)), torch.outer(factors, factors) * torch.cov(values) / 30
    )


def test_measurements_with_other_numbers_of_samples_or_unknown_samples_are_independent() -> None:
    values = found(4, 30)
    computed = covariances([1.0, 2.0, 3.0, 4.0], [values[0], values[1, :20], None, values[3]])
    independent = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64).diag()
    independent[0, 3] = independent[3, 0] = 4 * torch.corrcoef(values[[0, 3]])[0, 1]
    torch.testing.assert_close(computed, independent)


def test_other_samples_come_out_as_independent() -> None:
    values = found(2, 2000, shared=10.0)
    assert covariances([1.0, 1.0], list(values))[0, 1] > 0.95
    values[1] = values[1, torch.randperm(2000, generator=torch.Generator().manual_seed(1))]
    assert abs(covariances([1.0, 1.0], list(values))[0, 1]) < 0.1


@pytest.mark.parametrize("value", [0.0, 0.1, 1e300])
def test_equal_values_on_all_samples_count_as_independent(value: float) -> None:
    """For example shares of 0 or 1, whose reported errors are not 0."""
    same, other = torch.full((30,), value, dtype=torch.float64), found(1, 30)[0]
    computed = covariances([0.1, 0.1, 0.2], [same, same, other])
    assert torch.equal(computed[:, 2], torch.tensor([0.0, 0.0, 0.2**2], dtype=torch.float64))
    assert computed[0, 1] == 0


def test_no_combination_has_a_negative_variance() -> None:
    values = found(40, 10, shared=5.0)  # more measurements than samples
    eigenvalues = torch.linalg.eigvalsh(covariances([0.1] * 40, list(values)))
    assert eigenvalues.min() > -1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.bool])
def test_samples_of_any_type_are_accepted(dtype: torch.dtype) -> None:
    hits = (found(2, 30) > 0).to(dtype)
    expected = torch.corrcoef(hits.double())
    torch.testing.assert_close(covariances([1.0, 1.0], list(hits)), expected)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_numbers_of_any_size_are_paired(scale: float) -> None:
    values = found(2, 30)
    expected = covariances([1.0, 1.0], list(values))
    torch.testing.assert_close(covariances([1.0, 1.0], list(scale * values)), expected)


def test_no_measurements_have_no_covariances() -> None:
    assert covariances([], []).shape == (0, 0)
