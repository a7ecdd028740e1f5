"""The algorithm on plain matrices: Ritz values, residuals and growth, without a network."""

import pytest
import torch
from torch import Tensor

from lightning_robust.functional.input_space.krylov import (
    Accuracy,
    Eigenvalues,
    Projection,
    Subspace,
    largest_eigenvalues,
    power_iteration,
)

TIGHT = Accuracy(residual=1e-6, error=1e-9, products=60)


class Matrices:
    """Products with given Jacobians (n, C, D), which are counted."""

    def __init__(self, jacobians: Tensor) -> None:
        self.jacobians = jacobians
        self.times_taken = torch.zeros(len(jacobians), dtype=torch.long)
        self.active = torch.ones(len(jacobians), dtype=torch.bool)

    def needed(self, active: Tensor) -> None:
        assert not (active & ~self.active).any()  # a sample that is through does not come back
        self.active = active

    def transposed(self, vectors: Tensor) -> Tensor:
        return torch.einsum("ncd,nc->nd", self.jacobians, vectors.to(self.jacobians))

    def times(self, directions: Tensor) -> Tensor:
        self.times_taken += directions.any(dim=1)
        return torch.einsum("ncd,nd->nc", self.jacobians, directions)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(n: int, c: int, d: int, *, seed: int = 0) -> Tensor:
    """Jacobians whose singular values fall off, as those of networks do."""
    return random(n, c, d, seed=seed) * torch.logspace(0, -2, c, dtype=torch.float64)[None, :, None]


def weights(n: int, c: int, *, seed: int = 1) -> Tensor:
    return random(n, c, seed=seed).square()


def exact(jacobians: Tensor, diagonal: Tensor) -> Tensor:
    root = diagonal.sqrt()[:, :, None] * jacobians
    return torch.linalg.matrix_norm(root, ord=2).square()


def grown(jacobians: Tensor, diagonals: list[Tensor], accuracy: Accuracy) -> tuple[Eigenvalues, Subspace, Matrices]:
    products = Matrices(jacobians)
    subspace = Subspace(products)
    subspace.add(products.transposed(random(*jacobians.shape[:2], seed=5)))
    return (
        largest_eigenvalues(subspace, products, [lambda w, a=a: a * w for a in diagonals], accuracy),
        subspace,
        products,
    )


def test_the_largest_eigenvalues_for_several_matrices_on_one_subspace() -> None:
    jacobians, diagonals = decaying(5, 20, 30), [weights(5, 20), weights(5, 20, seed=2)]
    found, _, _ = grown(jacobians, diagonals, TIGHT)
    assert found.converged.all()
    expected = torch.stack([exact(jacobians, diagonal) for diagonal in diagonals])
    torch.testing.assert_close(found.value, expected, rtol=1e-8, atol=0)
    one, _, products = grown(jacobians, diagonals[:1], TIGHT)
    two, _, after = grown(jacobians, diagonals[1:], TIGHT)
    together = grown(jacobians, diagonals, TIGHT)[2].times_taken
    assert (together < products.times_taken + after.times_taken).all()
    torch.testing.assert_close(torch.cat([one.value, two.value]), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("accuracy", [Accuracy(0.5, 0.5, 60), Accuracy(0.1, 0.1, 60), Accuracy(0.03, 0.005, 60)])
def test_values_are_from_below_and_an_eigenvalue_is_within_the_residual(accuracy: Accuracy) -> None:
    jacobians, diagonal = decaying(40, 12, 15), weights(40, 12)
    found, _, _ = grown(jacobians, [diagonal], accuracy)
    spectra = torch.linalg.eigvalsh(torch.einsum("ncd,nc,nce->nde", jacobians, diagonal, jacobians))
    assert (found.value[0] <= spectra[:, -1] * (1 + 1e-12)).all()
    distances = (spectra - found.value[0][:, None]).abs().amin(dim=1)
    assert (distances <= found.residual[0] * (1 + 1e-9)).all()
    assert (found.residual[0] <= accuracy.residual * found.value[0]).all()
    assert found.converged.all()


def test_images_are_those_of_unit_ritz_vectors() -> None:
    jacobians, diagonal = decaying(6, 10, 12), weights(6, 10)
    found, _, _ = grown(jacobians, [diagonal], TIGHT)
    torch.testing.assert_close((diagonal * found.image[0].square()).sum(dim=1), found.value[0])


def test_a_sample_takes_no_product_more_than_it_needs() -> None:
    easy = torch.zeros(1, 20, 30, dtype=torch.float64)
    easy[0, 0] = random(30)
    jacobians = torch.cat([easy, random(1, 20, 30, seed=3)])
    _, subspace, products = grown(jacobians, [torch.ones(2, 20, dtype=torch.float64)], TIGHT)
    assert subspace.size[0] == 1
    assert subspace.size[1] > 5
    assert torch.equal(products.times_taken, subspace.size)


def test_where_it_does_not_converge_it_says_so_and_turns_to_the_next_matrix() -> None:
    jacobians, diagonals = random(3, 30, 40), [weights(3, 30), weights(3, 30, seed=2)]
    found, subspace, _ = grown(jacobians, diagonals, Accuracy(1e-6, 1e-9, 4))
    assert not found.converged.any()
    assert (subspace.size == 4).all()
    assert (found.residual > 0).all()
    expected = torch.stack([exact(jacobians, diagonal) for diagonal in diagonals])
    assert (found.value < expected).all()
    assert (found.value > 0.3 * expected).all()


def test_jacobians_and_information_of_zero_are_done_at_once() -> None:
    jacobians = torch.cat([torch.zeros(1, 4, 5, dtype=torch.float64), random(1, 4, 5)])
    found, subspace, _ = grown(jacobians, [torch.tensor([[1.0], [0.0]]).expand(2, 4).double()], TIGHT)
    assert torch.equal(found.value, torch.zeros(1, 2, dtype=torch.float64))
    assert found.converged.all()
    assert subspace.size.tolist() == [0, 1]


def test_products_that_contradict_each_other_end_unconverged() -> None:
    class Contradictory(Matrices):
        def transposed(self, vectors: Tensor) -> Tensor:
            return super().transposed(vectors) * 2

    products = Contradictory(decaying(3, 10, 12))
    subspace = Subspace(products)
    subspace.add(products.transposed(random(3, 10, seed=5)))
    found = largest_eigenvalues(subspace, products, [lambda w: w], TIGHT)
    assert not found.converged.any()


def test_a_subspace_as_large_as_the_space_holds_everything() -> None:
    jacobians, diagonal = random(4, 9, 3), weights(4, 9)
    found, subspace, _ = grown(jacobians, [diagonal], TIGHT)
    torch.testing.assert_close(found.value[0], exact(jacobians, diagonal))
    assert (subspace.size <= 3).all()
    information = torch.einsum("ncd,nc,nce->nde", jacobians, diagonal, jacobians)
    for _ in range(3):
        subspace.add(random(4, 3, seed=9))
    traces = Projection(subspace, lambda w: diagonal * w).trace()
    torch.testing.assert_close(traces, information.diagonal(dim1=1, dim2=2).sum(dim=1))
    assert (subspace.size == 3).all()


def test_vectors_stay_orthonormal_in_single_precision() -> None:
    jacobians = decaying(3, 40, 200).float()
    _, subspace, _ = grown(jacobians, [torch.ones(3, 40, dtype=torch.float64)], Accuracy(1e-5, 1e-5, 30))
    basis = torch.stack(subspace.vectors, dim=1)
    gram = basis @ basis.mT
    present = basis.any(dim=2)
    torch.testing.assert_close(gram, torch.diag_embed(present.float()), rtol=0, atol=1e-5)


def test_power_iteration_finds_the_same_by_more_products() -> None:
    jacobians, diagonals = decaying(5, 20, 30), [weights(5, 20), weights(5, 20, seed=2)]
    accuracy = Accuracy(1e-3, 1e-3, 2000)
    products = Matrices(jacobians)
    start = products.transposed(random(5, 20, seed=5))
    found, counts = power_iteration(start, products, [lambda w, a=a: a * w for a in diagonals], accuracy)
    assert found.converged.all()
    expected = torch.stack([exact(jacobians, diagonal) for diagonal in diagonals])
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=0)
    assert (found.value <= expected * (1 + 1e-12)).all()
    _, subspace, _ = grown(jacobians, diagonals, accuracy)
    assert counts.sum() > 2 * subspace.size.sum()
