import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_robust.functional import (
    Linearization,
    fim_spectral_norm,
    linearize,
    linearized_margin,
    linearized_margin_linf,
)
from lightning_robust.functional.input_space import jacobian
from tests.helpers.networks import NETWORKS, Linear, Normalised, build, normalise, random, random_linear
from tests.helpers.oracles import dense_margins, dense_spectral_norms, jacobian_by_differences
from tests.helpers.recording import PeakMemory, Recorder

every_network = pytest.mark.parametrize("name", NETWORKS)


def assert_same(actual: Linearization, expected: Linearization, *, tolerance: float = 1e-6) -> None:
    """Equal up to ``tolerance`` times the largest value of each field."""
    for field in ("logits", "gram", "gap_l1"):
        a, b = getattr(actual, field), getattr(expected, field)
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * float(b.abs().max()), msg=lambda m, f=field: f"{f}: {m}"
        )


def gaps_l1(jacobian: Tensor, logits: Tensor) -> Tensor:
    top = logits.argmax(dim=1)
    return torch.stack([(j - j[k]).abs().sum(dim=1) for j, k in zip(jacobian, top, strict=True)])


# --- what it computes -----------------------------------------------------------------------------------------------


@every_network
def test_gram_and_gaps_agree_with_central_differences(name: str) -> None:
    model, inputs, _ = build(name, num_samples=4)
    actual = linearize(model.double(), inputs.double())
    jacobian = jacobian_by_differences(model, inputs)
    torch.testing.assert_close(actual.gram, jacobian @ jacobian.mT, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(actual.gap_l1, gaps_l1(jacobian, actual.logits), rtol=1e-6, atol=1e-7)


@every_network
def test_logits_are_those_of_the_network_in_eval_mode(name: str) -> None:
    model, inputs, _ = build(name)
    actual = linearize(model, inputs).logits
    assert not actual.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(actual, model.eval()(inputs.clone()), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    num_samples=st.integers(1, 6),
    num_classes=st.integers(2, 9),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    chunk_size=st.none() | st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_linear_network_is_its_own_linearization(
    num_samples: int, num_classes: int, shape: tuple[int, ...], chunk_size: int | None, dtype: torch.dtype
) -> None:
    inputs = random(0, num_samples, *shape, dtype=dtype)
    model = random_linear(1, num_classes=num_classes, num_features=inputs[0].numel(), dtype=dtype)
    actual = linearize(model, inputs, chunk_size=chunk_size)
    weight = model.weight.detach().expand(num_samples, -1, -1)
    torch.testing.assert_close(actual.logits, model(inputs).detach())
    torch.testing.assert_close(actual.gram, weight @ weight.mT, check_dtype=False)
    torch.testing.assert_close(actual.gap_l1, gaps_l1(weight, actual.logits))


def test_the_gram_matrix_is_symmetric_and_positive_semi_definite() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    gram = linearize(model.double(), inputs.double(), chunk_size=2).gram
    torch.testing.assert_close(gram, gram.mT, rtol=1e-12, atol=1e-12)
    assert (torch.linalg.eigvalsh(gram)[:, 0] >= -1e-12 * gram.diagonal(dim1=1, dim2=2).sum(dim=1)).all()


def test_a_common_component_of_all_rows_does_not_drown_their_differences() -> None:
    """Adding the same function to all logits changes neither probabilities nor, in float32, the margin."""
    weight, common = random(0, 4, 20, dtype=torch.float32), 1000 * random(1, 20, dtype=torch.float32)
    inputs, model = random(2, 6, 20, dtype=torch.float32), Linear(weight + common)
    exact = linearize(copy.deepcopy(model).double(), inputs.double())
    predictions = exact.logits.argmax(dim=1)
    expected = linearized_margin(exact.logits, exact.gram, predictions)
    actual = linearize(model, inputs)
    torch.testing.assert_close(
        linearized_margin(actual.logits, actual.gram, predictions).double(), expected, rtol=2e-3, atol=0
    )


@every_network
def test_a_sample_has_the_same_values_alone_and_in_a_batch(name: str) -> None:
    model, inputs, _ = build(name, num_samples=5)
    together = linearize(model, inputs)
    alone = [linearize(model, x[None]) for x in inputs]
    fields = (torch.cat([getattr(one, field) for one in alone]) for field in ("logits", "gram", "gap_l1"))
    assert_same(together, Linearization(*fields))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 13, 1000])
@every_network
def test_chunk_size_changes_nothing(name: str, chunk_size: int) -> None:
    model, inputs, _ = build(name)
    assert_same(linearize(model, inputs, chunk_size=chunk_size), linearize(model, inputs))


def test_outputs_that_do_not_depend_on_the_input_have_zero_gradients() -> None:
    inputs = random(0, 3, 4)
    constant = linearize(lambda x: x.new_tensor([[1.0, 2.0, 3.0]]).expand(len(x), 3), inputs)
    assert not constant.gram.any()
    assert not constant.gap_l1.any()
    partly = linearize(lambda x: torch.stack([x[:, 0], torch.full_like(x[:, 0], 9.0)], dim=1), inputs)
    torch.testing.assert_close(partly.gram, torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double().expand(3, 2, 2))


def test_scalar_samples_are_inputs_like_any_other() -> None:
    slope = torch.tensor([1.0, -2.0, 0.5])
    actual = linearize(lambda x: x[:, None] * slope, torch.linspace(-1, 1, 5))
    torch.testing.assert_close(actual.gram, torch.outer(slope, slope).expand(5, 3, 3), check_dtype=False)


def test_a_network_that_squeezes_its_outputs_may_see_single_samples() -> None:
    inputs, network = random(0, 5, 4), random_linear(1, num_classes=3, num_features=4)
    squeezed = linearize(lambda x: network(x).squeeze(), inputs, chunk_size=2)  # two, two and one
    assert_same(squeezed, linearize(network, inputs))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.requires_grad_(),
    ],
    ids=["channels_last", "transposed", "requires_grad"],
)
def test_the_memory_layout_of_the_inputs_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    model, inputs, _ = build("cnn_batchnorm", num_samples=3)
    expected = linearize(model, inputs)
    given = layout(inputs.clone())
    assert_same(linearize(model, given), expected)
    assert given.grad is None
    assert torch.equal(given, inputs)


# --- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("std", "given"),
    [
        ([0.25, 0.25, 0.25], 0.25),
        ([0.25, 0.25, 0.25], torch.tensor(0.25)),
        ([0.2, 0.5, 2.0], [0.2, 0.5, 2.0]),
        ([0.2, 0.5, 2.0], torch.tensor([0.2, 0.5, 2.0], dtype=torch.float64)),
    ],
    ids=["scalar", "0-d tensor", "per channel", "tensor"],
)
def test_input_std_gives_the_values_of_a_network_that_normalises_itself(
    std: list[float], given: float | list[float] | Tensor
) -> None:
    model, mean, raw = build("cnn_batchnorm")[0].double(), [0.5, 0.4, 0.3], random(3, 4, 3, 7, 7)
    actual = linearize(model, normalise(raw, mean, std), input_std=given)
    targets = actual.logits.argmax(dim=1)
    whole = Normalised(model, mean, std)
    jacobian = jacobian_by_differences(whole, raw)
    torch.testing.assert_close(actual.gram, jacobian @ jacobian.mT, rtol=1e-6, atol=1e-7)

    expected = dense_spectral_norms(whole, raw)
    torch.testing.assert_close(fim_spectral_norm(actual.logits, actual.gram), expected, rtol=1e-7, atol=0)
    l2, linf = (dense_margins(whole, raw, targets, dual=dual) for dual in (2, 1))
    torch.testing.assert_close(linearized_margin(actual.logits, actual.gram, targets), l2, rtol=1e-7, atol=0)
    torch.testing.assert_close(linearized_margin_linf(actual.logits, actual.gap_l1, targets), linf, rtol=1e-7, atol=0)


def test_the_channels_of_input_std_are_dimension_one() -> None:
    inputs, std = random(0, 2, 3, 5), [1.0, 2.0, 4.0]
    model = random_linear(0, num_classes=3, num_features=15)
    weight = (model.weight.view(3, 3, 5) / torch.tensor(std).double()[:, None]).flatten(1).detach()
    actual = linearize(model, inputs, input_std=std)
    torch.testing.assert_close(actual.gram, (weight @ weight.T).expand(2, 3, 3))


# --- what it costs --------------------------------------------------------------------------------------------------


def test_the_cost_is_one_forward_pass_and_one_backward_pass_per_class() -> None:
    model = Recorder(random_linear(0, num_classes=6, num_features=8))
    linearize(model, random(0, 11, 8))
    assert model.record.batch_sizes == [11]
    assert model.record.num_input_backwards == 6


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 6, 10, 11, 1000])
def test_at_most_chunk_size_samples_pass_through_the_network_together(chunk_size: int) -> None:
    model = Recorder(random_linear(0, num_classes=6, num_features=8))
    linearize(model, random(0, 11, 8), chunk_size=chunk_size)
    full, rest = divmod(11, chunk_size)
    assert model.record.batch_sizes == [chunk_size] * full + [rest] * (rest > 0)


@pytest.mark.parametrize(
    ("num_classes", "sizes"), [(6, [4, 10]), (32, [4, 4, 2]), (64, [4, 2, 2, 2, 2, 2]), (1000, [4, *[1] * 10])]
)
def test_default_chunks_follow_the_number_of_classes_which_the_first_pass_tells(
    num_classes: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, network = random(0, 10, 8), random_linear(0, num_classes=num_classes, num_features=8)
    expected = linearize(network, inputs)
    monkeypatch.setattr(jacobian, "_DEFAULT_ELEMENTS", 32 * 4 * 8)  # four samples of 8 features and 32 classes
    model = Recorder(network)
    assert_same(linearize(model, inputs), expected)
    assert model.record.batch_sizes == sizes
    num_chunks = len(sizes) if num_classes == 32 else len(sizes) - 1  # otherwise the first pass has no backward pass
    assert model.record.num_input_backwards == num_classes * num_chunks


@pytest.mark.parametrize(("num_classes", "chunk_size"), [(10, 1), (10, 4), (24, 1)])
def test_memory_is_bounded_by_the_jacobians_of_a_chunk(num_classes: int, chunk_size: int) -> None:
    num_features, row = 2**19, 4 * 2**19
    inputs = random(0, 4, num_features, dtype=torch.float32)
    model = nn.Linear(num_features, num_classes)
    with PeakMemory() as memory:
        linearize(model, inputs, chunk_size=chunk_size)
    # the Jacobian; inputs, gradients and differences of the samples that pass together; float64 blocks of 8 MiB
    bound = (num_classes + 8) * chunk_size * row + 3 * 2**23
    assert memory.peak <= bound
    assert memory.live == 0


def test_memory_grows_with_the_chunk_size_and_not_with_the_number_of_samples() -> None:
    model = nn.Linear(2_000, 10)

    def peak(num_samples: int, chunk_size: int | None) -> int:
        inputs = random(0, num_samples, 2_000, dtype=torch.float32)
        with PeakMemory() as memory:
            linearize(model, inputs, chunk_size=chunk_size)
        return memory.peak

    assert peak(32, 2) <= 1.1 * peak(8, 2)
    assert 1.5 * peak(32, 2) < peak(32, 4)
    assert 8 * peak(32, 2) < peak(32, None)


def test_the_global_random_state_is_not_consumed() -> None:
    model, inputs, _ = build("attention", num_samples=3)
    before = torch.get_rng_state()
    linearize(model, inputs)
    assert torch.equal(torch.get_rng_state(), before)
