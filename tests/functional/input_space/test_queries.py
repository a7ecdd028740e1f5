"""Linearisations of models that only answer, against exact ones, and what is refused."""

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from lightning_robust.functional import (
    Linearization,
    fim_spectral_norm,
    fim_spectral_norm_by_queries,
    fim_trace,
    linearize,
    linearize_by_queries,
    linearized_margin,
)
from lightning_robust.functional.input_space.query_bias import largest_without_bias, relative_variance
from recipes.common.digits import digits
from recipes.common.networks import digits_cnn, initialised
from tests.helpers.networks import NETWORKS, build, normalise, random, random_linear

every_network = pytest.mark.parametrize("name", NETWORKS)
LINEAR = random_linear(0, num_classes=4, num_features=12)
INPUTS = random(1, 6, 12)
PIXELS, LABELS = digits()
TRAINED = slice(0, 600)


def all_features(inputs: Tensor) -> int:
    return inputs[0].numel()


def spectral_norm(linearization: Linearization) -> Tensor:
    return fim_spectral_norm_by_queries(linearization).value


def trained_cnn(steps: int) -> nn.Module:
    network = initialised(digits_cnn(), seed=0)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for dropout
        for _ in range(steps):
            rows = torch.randint(1297, (64,), generator=generator)
            loss = nn.functional.cross_entropy(network(PIXELS[rows]), LABELS[rows])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
    return network.eval().requires_grad_(False)


def arrays(inputs: Tensor) -> np.ndarray:
    return inputs.flatten(1).double().numpy()


def fitted(classifier: Any) -> Any:
    return classifier.fit(arrays(PIXELS[TRAINED]), LABELS[TRAINED].numpy())


# --- the oracle: exact linearisations -----------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("of", ["logits", "probabilities", "log-probabilities"])
def test_with_all_directions_it_is_exact_up_to_differences(name: str, of: str) -> None:
    model, inputs, _ = build(name)
    if name in ("resnet", "cnn_batchnorm"):  # kinks within a step of float32 would be part of the difference
        model, inputs = model.double(), inputs.double()
    expected = linearize(model, inputs)
    targets = expected.logits.argmax(dim=1)
    squash: dict[str, Callable[[Tensor], Tensor]] = {
        "logits": lambda z: z,
        "probabilities": lambda z: z.softmax(dim=1),
        "log-probabilities": lambda z: z.log_softmax(dim=1),
    }
    model.eval()
    actual = linearize_by_queries(lambda x: squash[of](model(x)), inputs, num_directions=all_features(inputs))
    assert actual.gap_l1 is None
    assert actual.gram_variance == 0
    torch.testing.assert_close(
        spectral_norm(actual), fim_spectral_norm(expected.logits, expected.gram), rtol=2e-3, atol=1e-6
    )
    torch.testing.assert_close(
        fim_trace(actual.logits, actual.gram), fim_trace(expected.logits, expected.gram), rtol=2e-3, atol=1e-6
    )
    torch.testing.assert_close(
        linearized_margin(actual.logits, actual.gram, targets),
        linearized_margin(expected.logits, expected.gram, targets),
        rtol=2e-3,
        atol=1e-6,
    )
    if of == "logits":
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.gram, expected.gram, rtol=5e-3, atol=1e-2 * float(expected.gram.std()))


def test_in_double_precision_differences_are_exact_to_seven_digits() -> None:
    expected, actual = linearize(LINEAR, INPUTS), linearize_by_queries(LINEAR, INPUTS, num_directions=12)
    torch.testing.assert_close(actual.gram, expected.gram, rtol=1e-6, atol=1e-6)


def test_the_mean_over_directions_is_the_gram_matrix() -> None:
    expected = linearize(LINEAR, INPUTS).gram
    draws = torch.stack(
        [
            linearize_by_queries(LINEAR, INPUTS, num_directions=3, generator=torch.Generator().manual_seed(seed)).gram
            for seed in range(150)
        ]
    )
    errors = (draws.mean(dim=0) - expected) / (draws.std(dim=0) / math.sqrt(len(draws)))
    assert errors.abs().max() < 4.5
    diagonals = draws.diagonal(dim1=2, dim2=3)  # of a squared slope, the error is known
    spread = diagonals.std(dim=0) / expected.diagonal(dim1=1, dim2=2)
    assert float(spread.mean()) == pytest.approx(relative_variance(3, 12) ** 0.5, rel=0.06)


def test_units_are_those_of_the_unnormalised_input() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    model, inputs = model.double(), inputs.double()
    expected = linearize(model, inputs, input_std=[0.2, 0.5, 2.0])
    options = {"num_directions": all_features(inputs), "input_std": [0.2, 0.5, 2.0]}
    torch.testing.assert_close(
        spectral_norm(linearize_by_queries(model, inputs, **options)),
        fim_spectral_norm(expected.logits, expected.gram),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_step_follows_the_size_of_the_inputs(scale: float, shift: float) -> None:
    model, inputs, _ = build("mlp")
    model.eval()
    unscaled = linearize(model, inputs)
    inputs = scale * (inputs + shift)
    actual = linearize_by_queries(lambda x: model(x / scale - shift), inputs, num_directions=12, input_std=1 / scale)
    expected = fim_spectral_norm(unscaled.logits, unscaled.gram)
    torch.testing.assert_close(spectral_norm(actual), expected, rtol=0.02, atol=1e-6)


def test_float64_that_was_computed_in_float32_gets_a_longer_step() -> None:
    model, inputs, _ = build("mlp")
    model.eval()
    expected = linearize(model, inputs)
    for squash in (nn.Identity(), nn.Softmax(dim=1)):

        def predict(x: np.ndarray, squash: nn.Module = squash) -> np.ndarray:
            with torch.no_grad():
                return squash(model(torch.tensor(x).float()).double()).numpy()

        actual = linearize_by_queries(predict, inputs.double().numpy(), num_directions=12)
        torch.testing.assert_close(
            spectral_norm(actual).float(), fim_spectral_norm(expected.logits, expected.gram), rtol=0.05, atol=1e-6
        )


def test_a_step_of_ones_own_is_taken() -> None:
    seen = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x)
        return LINEAR(x)

    linearize_by_queries(predict, INPUTS[:1], num_directions=2, step=0.125)
    distances = {round(float((row - INPUTS[0]).norm()), 6) for x in seen for row in x}
    assert distances == {0.0, 0.125, 0.25}


# --- which directions ---------------------------------------------------------------------------------------------


def test_a_sample_has_the_same_value_in_any_batch_and_chunk() -> None:
    model, inputs, _ = build("mlp")
    whole = linearize_by_queries(model, inputs, num_directions=4).gram
    parts = [linearize_by_queries(model, inputs[rows], num_directions=4).gram for rows in ([4, 2], [7])]
    torch.testing.assert_close(torch.cat(parts), whole[[4, 2, 7]], rtol=1e-3, atol=1e-3)
    chunked = linearize_by_queries(model, inputs, num_directions=4, chunk_size=1).gram
    torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-3)


def test_a_generator_chooses_the_directions() -> None:
    def gram(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return linearize_by_queries(LINEAR, INPUTS, num_directions=4, generator=generator).gram

    assert torch.equal(gram(1), gram(1))
    assert not torch.allclose(gram(1), gram(2), rtol=0.01)
    assert torch.equal(gram(None), gram(None))


def test_it_needs_two_queries_per_direction_and_a_few_more() -> None:
    sizes = []

    def predict(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return LINEAR(x)

    linearize_by_queries(predict, INPUTS, num_directions=10)
    assert sum(sizes) <= (2 * 10 + 20) * len(INPUTS)


# --- λ without bias -----------------------------------------------------------------------------------------------


def test_without_noise_nothing_is_corrected() -> None:
    eigenvalues = random(3, 5, 4).abs().sort(dim=1).values
    assert torch.equal(largest_without_bias(eigenvalues, 0.0), eigenvalues[:, -1])


@pytest.mark.parametrize(
    "spectrum", [(1.0,) * 6, (1.0, 0.9, 0.2, 0.1), (1.0, 0.5, 0.3, 0.1, 0.05), (1.0, 0.0, 0.0)], ids=str
)
@pytest.mark.parametrize(("m", "features"), [(200, 10_000), (24, 64)], ids=str)
def test_the_largest_eigenvalue_of_a_noisy_matrix_is_without_bias(
    spectrum: tuple[float, ...], m: int, features: int
) -> None:
    """Slopes along random directions of D are normal, but for a factor that makes them exact if m = D."""
    generator = torch.Generator().manual_seed(m)
    c = len(spectrum)
    if features > 1000:
        slopes = torch.randn(600, c, m, generator=generator, dtype=torch.float64) / math.sqrt(m)
    else:
        directions = torch.linalg.qr(torch.randn(600, features, m, generator=generator, dtype=torch.float64))[0]
        slopes = directions[:, :c] * math.sqrt(features / m)
    slopes = slopes * torch.tensor(spectrum, dtype=torch.float64).sqrt()[:, None]
    plain = torch.linalg.eigvalsh(slopes @ slopes.mT)
    corrected = largest_without_bias(plain, relative_variance(m, features))
    bias, plain_bias = (abs(float(values.mean()) - 1) for values in (corrected, plain[:, -1]))
    if spectrum[1] > 0.8:  # equal eigenvalues: their order is noise, and a part of the bias stays
        assert bias < 0.65 * plain_bias
    else:
        assert bias < 0.03


def test_the_largest_slope_along_random_directions_is_no_spectral_norm() -> None:
    """As in published code, and why it is not used here: of 3,072 dimensions, 200 directions hardly meet the one."""
    model = random_linear(0, num_classes=10, num_features=3072, dtype=torch.float32)
    model.weight.requires_grad_(False).div_(20)
    inputs = random(2, 8, 3, 32, 32, dtype=torch.float32)
    exact = linearize(model, inputs)
    norms = fim_spectral_norm(exact.logits, exact.gram)
    estimate = fim_spectral_norm_by_queries(linearize_by_queries(model, inputs, num_directions=200))
    ratios = estimate.value / norms
    assert 0.9 < ratios.median() < 1.1
    assert ((estimate.value - norms).abs() < 3 * estimate.stderr).all()
    directions = nn.functional.normalize(random(3, 8, 3072, 200, dtype=torch.float32), dim=1)
    probs = exact.logits.softmax(dim=1)
    slopes = model.weight @ directions
    along = (probs[..., None] * slopes.square()).sum(dim=1) - (probs[..., None] * slopes).sum(dim=1).square()
    assert (along.amax(dim=1) / norms).median() < 0.005


@pytest.mark.parametrize("steps", [5, 60])
def test_estimates_on_a_digits_network_are_right_and_so_are_their_errors(steps: int) -> None:
    _check_coverage(trained_cnn(steps), PIXELS[1297:1329], num_directions=32, seeds=5)


@pytest.mark.long
@pytest.mark.parametrize("steps", [5, 30, 300])
@pytest.mark.parametrize("num_directions", [32, 48])
def test_errors_cover_the_truth_over_many_seeds(steps: int, num_directions: int) -> None:
    _check_coverage(trained_cnn(steps), PIXELS[1297:1361], num_directions=num_directions, seeds=60)


@pytest.mark.long
def test_errors_cover_the_truth_with_200_of_1024_directions() -> None:
    network = nn.Sequential(nn.AvgPool2d(4), trained_cnn(300))
    images = nn.functional.interpolate(PIXELS[1297:1313], scale_factor=4)
    _check_coverage(network, images, num_directions=200, seeds=40)


# Not on an untrained network: dark pixels then lie exactly at the kink of a ReLU, where autograd takes a slope of 0 and
# central differences the mean of both sides.
def _check_coverage(network: nn.Module, images: Tensor, *, num_directions: int, seeds: int) -> None:
    exact = linearize(network, images)
    truth = fim_spectral_norm(exact.logits, exact.gram)
    estimates = [
        fim_spectral_norm_by_queries(
            linearize_by_queries(
                lambda x: network(x).softmax(dim=1),
                images,
                num_directions=num_directions,
                generator=torch.Generator().manual_seed(seed),
            )
        )
        for seed in range(seeds)
    ]
    values = torch.stack([estimate.value for estimate in estimates])
    errors = torch.stack([estimate.stderr for estimate in estimates])
    covered = ((values - truth).abs() <= 2 * errors).double().mean()
    assert 0.9 <= (values / truth).median() <= 1.1
    tolerance = 0.02 + 3 * float((errors / truth).mean()) / math.sqrt(values.numel())
    assert abs(float((values / truth).mean()) - 1) < tolerance
    assert 0.9 <= covered <= 0.99


# --- what models may be -------------------------------------------------------------------------------------------


def test_a_logistic_regression_of_scikit_learn_has_its_closed_form() -> None:
    classifier = fitted(LogisticRegression(max_iter=300))
    inputs = arrays(PIXELS[1300:1320])
    probs, weights = torch.tensor(classifier.predict_proba(inputs)), torch.tensor(classifier.coef_)
    fisher = torch.stack([weights.T @ (torch.diag(p) - torch.outer(p, p)) @ weights for p in probs])
    expected = torch.linalg.eigvalsh(fisher)[:, -1]
    for predict in (classifier.predict_proba, classifier.predict_log_proba, classifier.decision_function):
        exact = spectral_norm(linearize_by_queries(predict, inputs, num_directions=64))
        torch.testing.assert_close(exact, expected, rtol=1e-5, atol=0)
    estimate = fim_spectral_norm_by_queries(linearize_by_queries(classifier.predict_proba, inputs, num_directions=32))
    assert 0.9 < (estimate.value / expected).median() < 1.1
    assert ((estimate.value - expected).abs() < 3 * estimate.stderr).all()
    of_tensors = linearize_by_queries(classifier.predict_proba, torch.tensor(inputs), num_directions=64)
    torch.testing.assert_close(spectral_norm(of_tensors), expected, rtol=1e-5, atol=0)


def test_a_support_vector_machine_is_measured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about `probability`
        classifier = fitted(SVC(random_state=0, probability=True))
    inputs = arrays(PIXELS[1300:1304])
    step = 1e-5 * np.eye(64)
    around = [[classifier.predict_log_proba(x + sign * step) for sign in (1, -1)] for x in inputs]
    slopes = torch.stack([torch.tensor(up - down) for up, down in around]) / 2e-5  # (N, D, C)
    probs = torch.tensor(classifier.predict_proba(inputs))
    expected = torch.linalg.eigvalsh(torch.einsum("nc,ndc,nec->nde", probs, slopes, slopes))[:, -1]
    actual = spectral_norm(linearize_by_queries(classifier.predict_proba, inputs, num_directions=64))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


def test_a_network_in_onnx_runtime_has_its_exact_value() -> None:
    helper = pytest.importorskip("onnx.helper", reason="needs onnx: pip install -e '.[test]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[test]'")
    model, inputs, _ = build("mlp")
    layers = [module for module in model.eval() if isinstance(module, nn.Linear)]
    constants, nodes, value = [], [], "x"
    for number, (layer, activation) in enumerate(zip(layers, ("Tanh", "Relu", "Softmax"), strict=True)):
        for name, parameter in layer.named_parameters():
            array = parameter.detach()
            constants.append(helper.make_tensor(f"{name}{number}", 1, array.shape, array.flatten().tolist()))
        gemm = [value, f"weight{number}", f"bias{number}"]
        nodes.append(helper.make_node("Gemm", gemm, [f"z{number}"], transB=1))
        value = f"a{number}"
        nodes.append(helper.make_node(activation, [f"z{number}"], [value]))
    ends = [helper.make_tensor_value_info(*end) for end in (("x", 1, ["n", 12]), (value, 1, ["n", 6]))]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], constants)
    exported = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])

    exact = linearize(model, inputs)
    expected = fim_spectral_norm(exact.logits, exact.gram)
    by_queries = linearize_by_queries(lambda x: session.run(None, {"x": x}), inputs.numpy(), num_directions=12)
    torch.testing.assert_close(spectral_norm(by_queries), expected, rtol=5e-3, atol=1e-6)


def test_a_module_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    before = copy.deepcopy(model.state_dict())
    actual = linearize_by_queries(model, inputs, num_directions=147)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = linearize(model, inputs)
    torch.testing.assert_close(
        spectral_norm(actual), fim_spectral_norm(expected.logits, expected.gram), rtol=0.02, atol=0
    )


def test_saturated_probabilities_keep_their_digits() -> None:
    """The largest is rounded to 1; all that is to be known is in the others."""
    model = random_linear(5, num_classes=3, num_features=8, dtype=torch.float32)
    inputs = 6 * random(6, 8, 8, dtype=torch.float32)
    exact = linearize(model, inputs)
    probs = exact.logits.softmax(dim=1).amax(dim=1)
    assert (probs == 1).any()
    actual = linearize_by_queries(lambda x: model(x).softmax(dim=1), inputs, num_directions=8)
    torch.testing.assert_close(spectral_norm(actual), fim_spectral_norm(exact.logits, exact.gram), rtol=5e-3, atol=0)
    targets = exact.logits.argmax(dim=1)
    margins = [linearized_margin(found.logits, found.gram, targets) for found in (actual, exact)]
    torch.testing.assert_close(*margins, rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_answers_in_half_precision_are_measured_roughly(dtype: torch.dtype) -> None:
    exact = linearize(LINEAR, INPUTS)
    actual = linearize_by_queries(lambda x: LINEAR(x).to(dtype), INPUTS, num_directions=12)
    expected = fim_spectral_norm(exact.logits, exact.gram)
    torch.testing.assert_close(spectral_norm(actual).double(), expected, rtol=0.1, atol=0)


def test_constant_models_and_flat_samples_have_no_slope_and_are_no_false_alarm() -> None:
    constant = linearize_by_queries(lambda x: np.full((len(x), 3), 1 / 3), INPUTS.numpy(), num_directions=5)
    assert not constant.gram.any()
    dead = linearize_by_queries(lambda x: LINEAR((x - 2.5).relu()), INPUTS, num_directions=12)
    exact = linearize(lambda x: LINEAR((x - 2.5).relu()), INPUTS)
    assert (exact.gram.abs().amax(dim=(1, 2)) == 0).any()
    torch.testing.assert_close(dead.gram, exact.gram, rtol=1e-5, atol=1e-6)


def test_masked_classes_stay_masked() -> None:
    mask = torch.tensor([False, True, False, False])
    actual = linearize_by_queries(lambda x: LINEAR(x).masked_fill(mask, -torch.inf), INPUTS, num_directions=12)
    exact = linearize(lambda x: LINEAR(x).masked_fill(mask, -torch.inf), INPUTS)
    torch.testing.assert_close(spectral_norm(actual), fim_spectral_norm(exact.logits, exact.gram))


def test_extras_go_with_their_samples() -> None:
    shift = random(8, 6, 12)
    actual = linearize_by_queries(
        lambda x, shift: LINEAR((x + shift).tanh()), INPUTS, num_directions=12, extras={"shift": shift}
    )
    exact = linearize(lambda x, shift: LINEAR((x + shift).tanh()), INPUTS, extras={"shift": shift})
    torch.testing.assert_close(actual.gram, exact.gram, rtol=1e-5, atol=1e-5)


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "attention"])
@pytest.mark.parametrize("digits", [3, 4, 5])
def test_rounded_probabilities_are_measured_within_a_fifth_or_refused(name: str, digits: int) -> None:
    model, inputs, _ = build(name, num_samples=12)
    model.eval()
    exact = linearize(model, inputs)
    expected = fim_spectral_norm(exact.logits, exact.gram)

    def rounded(x: Tensor) -> Tensor:
        return model(x).softmax(dim=1).round(decimals=digits)

    def found(n: int) -> Tensor | str:
        try:
            return spectral_norm(linearize_by_queries(rounded, inputs[n : n + 1], num_directions=all_features(inputs)))
        except ValueError as error:
            return str(error)

    values = [found(n) for n in range(len(inputs))]
    measured = [n for n, value in enumerate(values) if isinstance(value, Tensor)]
    refusals = [value for value in values if isinstance(value, str)]
    assert all(re.search("rounded|digits|steps of", refusal) for refusal in refusals)
    assert bool(measured) == (digits > 3)
    for n in measured:
        torch.testing.assert_close(values[n], expected[n : n + 1], rtol=0.2, atol=0)


def test_probabilities_that_are_rounded_to_one_are_refused() -> None:
    def rounded(x: Tensor) -> Tensor:
        return (20 * LINEAR(x)).softmax(dim=1).round(decimals=4)

    with pytest.raises(ValueError, match="rounded"):
        linearize_by_queries(rounded, INPUTS, num_directions=12)


# --- what is refused ----------------------------------------------------------------------------------------------

PIECEWISE_CONSTANT = {
    "forest": RandomForestClassifier(20, random_state=0),
    "forest of impure leaves": RandomForestClassifier(20, min_samples_leaf=5, random_state=0),
    "many trees": ExtraTreesClassifier(60, min_samples_leaf=3, random_state=0),
    "tree": DecisionTreeClassifier(random_state=0),
    "boosting": HistGradientBoostingClassifier(max_iter=10, random_state=0),
    "neighbours": KNeighborsClassifier(),
}


@pytest.mark.parametrize("kind", PIECEWISE_CONSTANT)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_piecewise_constant_models_are_refused_with_the_finding(kind: str, dtype: type) -> None:
    classifier = fitted(PIECEWISE_CONSTANT[kind])
    inputs = arrays(PIXELS[1300:1306]).astype(dtype)
    with pytest.raises(ValueError, match=r"do not change within ±|The outputs jump") as raised:
        linearize_by_queries(classifier.predict_proba, inputs, num_directions=8)
    assert "`lightning_robust.functional.decision_margin`" in str(raised.value)


def test_a_forest_whose_votes_are_rounded_is_not_taken_for_a_smooth_model() -> None:
    forest = fitted(RandomForestClassifier(20, min_samples_leaf=5, random_state=0))
    with pytest.raises(ValueError, match=r"jump|steps of"):
        linearize_by_queries(lambda x: forest.predict_proba(x).round(4), arrays(PIXELS[1300:1306]), num_directions=8)


def test_a_quantised_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"jump|do not change"):
        linearize_by_queries(lambda x: LINEAR((50 * x).round() / 50), INPUTS, num_directions=8)


class Stateful:
    """Answers that depend on the calls before."""

    def __init__(self, answer: Callable[[Tensor, int], Tensor]) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.answer(x, self.calls)


def noise(x: Tensor, call: int) -> Tensor:
    return LINEAR(x) + random(call, len(x), 4)


REFUSED: dict[str, tuple[Callable[[], Callable[[Tensor], Any]], str]] = {
    "noise": (lambda: Stateful(noise), "answers the same query differently"),
    "counts calls": (lambda: Stateful(lambda x, call: LINEAR(x) + 0.1 * call * x[:, :1]), "same query differently"),
    "answers less after a while": (
        lambda: Stateful(lambda x, call: LINEAR(x) * (1 if call < 5 else 0.5)),
        "same query differently",
    ),
    "changes its shape": (
        lambda: Stateful(lambda x, call: LINEAR(x)[:, : 4 if call < 4 else 3]),
        "same shape and type",
    ),
    "changes its type": (
        lambda: Stateful(lambda x, call: LINEAR(x).to(torch.float64 if call < 4 else torch.float32)),
        "same shape and type",
    ),
    "NaN": (lambda: lambda x: LINEAR(x) * torch.nan, "NaN or infinity"),
    "NaN beside the samples": (
        lambda: lambda x: LINEAR(x).masked_fill(~(x[:, None] == INPUTS).all(dim=2).any(dim=1)[:, None], torch.nan),
        "NaN or infinity.*inputs beside the samples",
    ),
    "infinity": (lambda: lambda x: LINEAR(x) + torch.inf, "NaN or infinity"),
    "labels": (lambda: lambda x: LINEAR(x).argmax(dim=1), "Labels have no slope"),
    "text": (lambda: lambda x: np.array(["cat"] * len(x)), "it returned ndarray"),
    "nothing": (lambda: lambda x: None, "it returned NoneType"),
    "one probability": (lambda: lambda x: LINEAR(x)[:, 0].sigmoid(), r"np.stack\(\[1 - p, p\]"),
    "one column": (lambda: lambda x: LINEAR(x)[:, :1], r"np.stack\(\[1 - p, p\]"),
    "one row": (lambda: lambda x: LINEAR(x)[:1], r"it returned shape \(1, 4\)"),
    "maps": (lambda: lambda x: LINEAR(x)[..., None], r"it returned shape \(6, 4, 1\)"),
    "one-hot rows": (lambda: lambda x: nn.functional.one_hot(LINEAR(x).argmax(1), 4).float(), "piecewise constant"),
    "certain": (lambda: lambda x: (1e4 * LINEAR(x)).softmax(dim=1), "probability of 1 for one class|constant"),
    "bound to the batch": (lambda: lambda x: LINEAR(x + INPUTS[: len(x)]), "place in the batch|sizes of tensors|size"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_answers_that_cannot_be_measured_are_refused(kind: str) -> None:
    predict, sentence = REFUSED[kind]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence):
        linearize_by_queries(predict(), INPUTS, num_directions=8)


@pytest.mark.parametrize("wrong", [0, 1, 13, 200])
def test_the_number_of_directions_lies_between_two_and_that_of_features(wrong: int) -> None:
    with pytest.raises(ValueError, match="`num_directions` to be"):
        linearize_by_queries(LINEAR, INPUTS, num_directions=wrong)


def test_normalised_inputs_with_channels_are_moved_in_their_own_units() -> None:
    """A network that normalises its inputs itself, and one that gets them normalised, have the same λ."""
    model, inputs, _ = build("cnn_batchnorm")
    model, raw = model.double().eval(), inputs.double()
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    inside = linearize_by_queries(lambda x: model(normalise(x, mean, std)), raw, num_directions=147)
    outside = linearize_by_queries(model, normalise(raw, mean, std), num_directions=147, input_std=std)
    torch.testing.assert_close(spectral_norm(inside), spectral_norm(outside), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "spoilt",
    [lambda p: 100 * p, lambda p: p.clip(1e-3, 1 - 1e-3), lambda p: p + 1e-4, lambda p: 0.9 * p],
    ids=["percent", "clipped", "raised", "not normalised"],
)
def test_probabilities_that_do_not_sum_to_one_are_no_logits(spoilt: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=re.escape("return `p / p.sum(axis=1, keepdims=True)`")):
        linearize_by_queries(lambda x: spoilt((3 * LINEAR(x)).softmax(dim=1)), INPUTS, num_directions=12)


def test_logits_without_a_negative_one_are_logits() -> None:
    expected = linearize(lambda x: LINEAR(x) + 50, INPUTS)
    found = linearize_by_queries(lambda x: LINEAR(x) + 50, INPUTS, num_directions=12)
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-5, atol=1e-6)
