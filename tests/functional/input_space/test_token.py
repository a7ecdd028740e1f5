"""Words at the positions of a sequence, against dense Fisher matrices in float64, scipy, and what must not matter."""

import math
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.func import jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_robust import Probe
from lightning_robust.functional import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_spectral_norm_matrix_free,
    fit_temperature,
    linearize,
    linearized_margin,
    saturated,
)
from lightning_robust.functional.input_space import input_information
from lightning_robust.functional.input_space.likelihoods import likelihood_of
from lightning_robust.functional.input_space.loss_curves import fit_curves, loss_curves
from lightning_robust.functional.input_space.softmax_root import softmax_root_of_many
from tests.helpers.language import LanguageModel, texts, train

N, T, V, D = 5, 6, 11, 8
TOKEN = likelihood_of("token")


def model_of(dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = LanguageModel(V, width=D, length=T, heads=2).to(dtype).eval()
    model.head.weight.data *= 4
    return model


def sequences(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Embeddings and words; some positions do not count."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, T, D, generator=generator, dtype=torch.float64).to(dtype)
    words = torch.randint(V, (N, T), generator=generator)
    words[1, 3:], words[2, :2], words[3, 1:] = -100, -100, -100
    return x, words


def probe_of(dtype: torch.dtype = torch.float64, **options: Any) -> Probe:
    model, (x, words) = model_of(dtype), sequences(dtype)
    return Probe(model.from_embeddings, x, words, likelihood="token", module=model, **options)


def dense(model: LanguageModel, x: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Information (T·D, T·D) of one sequence, position by position."""
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(lambda one: model.from_embeddings(one[None])[0])(x).flatten(2)
    probs = (model.from_embeddings(x[None])[0] / temperature).softmax(dim=1)
    total = torch.zeros(x.numel(), x.numel(), dtype=x.dtype)
    for rows, p, counts in zip(jacobian, probs, counted, strict=True):
        if counts:
            total += rows.mT @ (p.diag() - p[:, None] * p) @ rows / temperature**2
    return total.detach()


def dense_norms(temperature: float = 1.0, *, all_count: bool = False) -> Tensor:
    x, words = sequences()
    counted = torch.ones_like(words) if all_count else words != -100
    matrices = [dense(model_of(), one, some, temperature) for one, some in zip(x, counted, strict=True)]
    return torch.stack([torch.linalg.eigvalsh(matrix)[-1] for matrix in matrices])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_spectral_norm_is_that_of_the_dense_fisher_matrix(
    dtype: torch.dtype, within: float, temperature: float
) -> None:
    x, _ = sequences(dtype)
    options: dict[str, Any] = {"likelihood": "token", "temperature": temperature, "max_products": 60}
    tolerance = 1e-3 if dtype == torch.float32 else 1e-7
    found = fim_spectral_norm_matrix_free(model_of(dtype).from_embeddings, x, tolerance=tolerance, **options)
    assert found.converged.all()
    assert found.value.dtype == dtype
    expected = dense_norms(temperature, all_count=True).to(dtype)
    torch.testing.assert_close(found.value, expected, rtol=within, atol=0)
    power = fim_spectral_norm_matrix_free(
        model_of(dtype).from_embeddings, x, method="power", tolerance=1e-3, **(options | {"max_products": 3000})
    )
    torch.testing.assert_close(power.value, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_probe_leaves_out_positions_that_do_not_count_and_is_right_to_1_percent_at_both_temperatures(
    dtype: torch.dtype,
) -> None:
    information = probe_of(dtype).information
    assert information.logits is None
    assert information.converged.all()
    for value, temperature in zip(information.value, information.temperatures, strict=True):
        torch.testing.assert_close(value, dense_norms(temperature), rtol=1e-3, atol=0)
    step = 1e-3
    up, down = (dense_norms(information.temperatures[0] * (1 + sign * step)) for sign in (1, -1))
    torch.testing.assert_close(information.slope[0], (up / down).log() / (2 * step), rtol=0.02, atol=0.01)


def test_the_trace_is_unbiased() -> None:
    model, (x, _) = model_of(), sequences()
    expected = [dense(model, one, torch.ones(T), 1.0).trace() for one in x]
    found = input_information.input_information(
        model.from_embeddings,
        x.repeat(100, 1, 1),
        temperatures=[1.0],
        likelihood=TOKEN,
        accuracy=input_information.Accuracy(0.5, 0.5, 2),  # a small subspace, so that most is estimated
        generator=torch.Generator().manual_seed(0),
    ).trace.view(100, N)
    stderr = found.std(dim=0) / math.sqrt(len(found))
    assert (stderr > 0).all()
    assert ((found.mean(dim=0) - torch.stack(expected)).abs() < 4 * stderr).all()


@pytest.mark.parametrize("width", [5, 32, 200])
def test_the_root_for_many_words_is_one_whatever_their_order(width: int) -> None:
    logits = 2 * torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1, 0], logits[2, 1:] = 30.0, -torch.inf  # nearly certain, and entirely
    root = torch.stack([softmax_root_of_many(logits, torch.eye(width)[i].expand(3, -1)) for i in range(width)], dim=2)
    p = logits.softmax(dim=1)
    torch.testing.assert_close(root @ root.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None], rtol=0, atol=1e-12)


def nll(logits: Tensor, words: Tensor, beta: float) -> float:
    return float(F.cross_entropy(logits.flatten(0, 1) * beta, words.flatten(), ignore_index=-100, reduction="sum"))


def best_temperature(logits: Tensor, words: Tensor) -> float:
    found = minimize_scalar(
        lambda log_beta: nll(logits, words, math.exp(log_beta)),
        bounds=(-5.5, 5.5),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return math.exp(-found.x)


@pytest.mark.parametrize("true", [0.02, 0.3, 0.7, 1.0, 1.7, 4.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_temperature_is_that_of_scipy_and_does_not_depend_on_how_sequences_are_spread(
    true: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(int(100 * true))
    logits = true * 2 * torch.randn(12, 20, 40, generator=generator, dtype=torch.float64)
    words = torch.multinomial((logits / true).softmax(dim=2).flatten(0, 1), 1, generator=generator).view(12, 20)
    words[:, 15:] = -100
    logits[0, 0, 3:7] = -torch.inf  # banned words
    words[0, 0] = 0
    expected = best_temperature(logits, words)
    found = fit_temperature(logits.to(dtype), words, likelihood="token")
    assert float(found) == pytest.approx(expected, rel=1e-3)
    parts = [loss_curves(logits[rows].to(dtype), words[rows]) for rows in (slice(0, 1), slice(1, 9), slice(9, 12))]
    assert float(fit_curves(torch.cat(parts)).temperature) == pytest.approx(float(found), rel=1e-6)


def test_influences_tell_how_each_sequence_moves_the_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(30, 8, 10, generator=generator, dtype=torch.float64)
    words = torch.multinomial((logits / 1.3).softmax(dim=2).flatten(0, 1), 1, generator=generator).view(30, 8)
    curves = loss_curves(logits, words)
    fit = fit_curves(curves)
    assert abs(float(fit.influences.mean())) < 1e-6
    for left_out in range(4):
        others = fit_curves(torch.cat([curves[:left_out], curves[left_out + 1 :]]))
        moved = 1 / fit.temperature - 1 / others.temperature
        assert float(moved) == pytest.approx(float(fit.influences[left_out]) / 29, rel=0.15, abs=1e-4)


def test_the_ends_of_the_range_and_what_has_no_temperature() -> None:
    words = torch.zeros(2, 3, dtype=torch.long)
    against = torch.tensor([0.0, 1.0]).expand(2, 3, 2)  # worse than even odds
    assert fit_temperature(against, words, likelihood="token") == 2**8
    assert fit_temperature(-1e-6 * against, words, likelihood="token") == 2**-8
    tame = float(fit_temperature(-against, words, likelihood="token"))  # separable: smoothed, not at the end
    assert 2**-8 < tame < 1
    assert fit_temperature(against, torch.full_like(words, -100), likelihood="token") == 1
    assert fit_temperature(0 * against, words, likelihood="token") == 1
    fit = fit_curves(loss_curves(against, words))
    assert not fit.influences.any()


def test_positions_that_do_not_count_have_no_influence() -> None:
    x, words = sequences()
    model = model_of()
    ignored = words == -100

    def perturbed(x: Tensor) -> Tensor:
        logits = model.from_embeddings(x)
        return torch.where(ignored_of(x)[..., None], 100 * logits.flip(2), logits)

    def ignored_of(z: Tensor) -> Tensor:
        return torch.stack([ignored[int((x - one).flatten(1).abs().sum(dim=1).argmin())] for one in z])

    clean = Probe(model.from_embeddings, x, words, likelihood="token", module=model)
    other = Probe(perturbed, x, words, likelihood="token", module=model)
    assert torch.equal(clean.information.value, other.information.value)
    assert torch.equal(clean.information.trace, other.information.trace)
    assert torch.equal(clean.evidence, other.evidence)
    zero = Probe(
        model.from_embeddings,
        x,
        words.masked_fill(ignored, 0),
        likelihood="token",
        module=model,
        loss_fn=nn.CrossEntropyLoss(ignore_index=0),
    )
    dropped = words.masked_fill(words == 0, -100)
    same = Probe(model.from_embeddings, x, dropped, likelihood="token", module=model)
    assert torch.equal(zero.information.value, same.information.value)
    assert torch.equal(zero.evidence, same.evidence)


def test_a_sequence_without_any_position_has_a_norm_of_0() -> None:
    x, words = sequences()
    words[2] = -100
    model = model_of()
    information = Probe(model.from_embeddings, x, words, likelihood="token", module=model).information
    assert (information.value[:, 2] == 0).all()
    assert information.trace[2] == 0
    assert (information.value[:, [0, 1, 3, 4]] > 0).all()
    assert information.converged.all()


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_change_nothing(chunk_size: int) -> None:
    together, apart = probe_of(temperature=1.5), probe_of(temperature=1.5, chunk_size=chunk_size)
    torch.testing.assert_close(apart.information.value, together.information.value, rtol=1e-6, atol=0)
    torch.testing.assert_close(apart.information.trace, together.information.trace, rtol=1e-6, atol=0)
    torch.testing.assert_close(apart.evidence, together.evidence, rtol=1e-9, atol=1e-12)
    rows = torch.cat(
        [together.rows(slice(0, 2)).information.value, together.rows(slice(2, 5)).information.value], dim=1
    )
    torch.testing.assert_close(rows, together.information.value, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("length", "width", "schedule"),
    [(8, 16, (0, 30)), pytest.param(24, 32, (0, 50, 200), marks=pytest.mark.long)],
    ids=["small", "larger"],
)
def test_a_language_model_of_5000_words_is_right_to_1_percent_within_60_forward_passes(
    length: int, width: int, schedule: tuple[int, ...]
) -> None:
    words, count = 5000, 3
    model = LanguageModel(words, width=width, length=length)
    for steps in schedule:  # nearly uniform at first
        train(model.train(), steps, length=length, num_words=words)
        ids, targets = texts(count, length, words, seed=7)
        x = model.eval().words(ids).detach()
        with FlopCounterMode(display=False) as once, torch.no_grad():
            model.from_embeddings(x)
        probe = Probe(model.from_embeddings, x, targets, likelihood="token", module=model)
        with FlopCounterMode(display=False) as counted:
            information = probe.information
        assert counted.get_total_flops() <= 60 * once.get_total_flops()
        assert information.converged.all()
        for temperature, value in zip(information.temperatures, information.value, strict=True):
            exact = torch.stack([largest_from_rows(model, one, temperature) for one in x])
            torch.testing.assert_close(value, exact, rtol=0.01, atol=0)
            assert (value <= exact * (1 + 1e-4)).all()


def largest_from_rows(model: LanguageModel, x: Tensor, temperature: float) -> Tensor:
    """Largest eigenvalue of the dense matrix (T·D, T·D) of one sequence, by one forward derivative per feature."""
    model, x = model.double(), x.double()
    flat, n = x.flatten(), x.numel()

    def image(v: Tensor) -> Tensor:
        return jvp(lambda z: model.from_embeddings(z.view(1, *x.shape))[0], (flat,), (v,))[1]

    with sdpa_kernel(SDPBackend.MATH):
        images = vmap(image, chunk_size=64)(torch.eye(n, dtype=torch.float64)).detach()  # (T·D, T, V)
    p = (model.from_embeddings(x[None])[0] / temperature).softmax(dim=1).detach()
    centred = (images - (images * p).sum(dim=2, keepdim=True)).mul_(p.sqrt()).flatten(1)
    model.float()
    return torch.linalg.eigvalsh(centred @ centred.mT)[-1] / temperature**2


class Wide(nn.Module):
    """Logits of 50,000 words from embeddings."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 50_000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.cumsum(dim=1))))


def test_sequences_of_50000_words_pass_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Wide().eval(), []
    model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    x = torch.randn(3, 48, 8, generator=torch.Generator().manual_seed(0))
    words = torch.randint(50_000, (3, 48), generator=torch.Generator().manual_seed(1))
    probe = Probe(model, x, words, likelihood="token", temperature=1.0)
    information = probe.information
    assert set(seen) == {1}
    assert information.converged.all()
    seen.clear()
    short = Probe(model, x[:, :4], words[:, :4], likelihood="token", temperature=1.0)
    assert short.information.converged.all()
    assert max(seen) == 2  # of 200,000 logits each, all that are left after the first


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w[:, 0], r"index of a word for each position.*\(5, T\)"),
        (lambda w: w.float(), "index of a word for each position.*float32"),
        (lambda w: w[:, :4], r"logits \(N, 4, V\) for targets \(N, 4\)"),
        (lambda w: w.masked_fill(w == -100, -1), r"between 0 and 10.*from -1 to .*ignore_index"),
        (lambda w: w + 10 * (w > 0), "between 0 and 10"),
    ],
)
def test_targets_that_are_no_words_are_refused(change: Any, told: str) -> None:
    model, (x, words) = model_of(), sequences()
    with pytest.raises(ValueError, match=told):
        _ = Probe(model.from_embeddings, x, change(words), likelihood="token", module=model).information


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda x: model_of().from_embeddings(x)[:, 0], r"logits of shape \(N, T, V\).*returned shape \(\d, 11\)"),
        (lambda x: model_of().from_embeddings(x)[..., :1], "V ≥ 2 words"),
        (lambda x: model_of().from_embeddings(x).transpose(1, 2), "Words belong into the last dimension"),
        (lambda x: model_of().from_embeddings(x) / 0, "Expected finite (logits|outputs)"),
    ],
)
def test_outputs_that_are_no_words_at_positions_are_refused(model: Any, told: str) -> None:
    x, words = sequences()
    with pytest.raises(ValueError, match=told):
        _ = Probe(model, x, words, likelihood="token").evidence


def test_logits_are_found_among_other_outputs() -> None:
    model, (x, words) = model_of(), sequences()
    expected = probe_of().evidence
    wraps = (
        lambda z: {"loss": z.mean(), "logits": z, "past": (z, z)},
        lambda z: (z, z[:, 0]),
        lambda z: {"lm_logits": z, "hidden_states": z[..., :3]},
        lambda z: {"out": z, "features": z[..., :3]},
    )
    for wrap in wraps:
        probe = Probe(lambda x, wrap=wrap: wrap(model.from_embeddings(x)), x, words, likelihood="token", module=model)
        torch.testing.assert_close(probe.evidence, expected)
    both = Probe(lambda x: (model.from_embeddings(x), model.from_embeddings(x)), x, words, likelihood="token")
    with pytest.raises(ValueError, match="several entries that could be the logits"):
        _ = both.evidence


def test_what_takes_all_gradients_is_refused_in_one_sentence() -> None:
    model, (x, words) = model_of(), sequences()
    logits, gram = torch.zeros(2, 3), torch.zeros(2, 3, 3)
    refused = "Expected another likelihood than 'token'"
    for call in (
        lambda: linearize(model.from_embeddings, x, likelihood="token"),
        lambda: fim_spectral_norm(logits, gram, likelihood="token"),
        lambda: calibrated_fim_spectral_norm(logits, gram, torch.zeros(2), likelihood="token"),
        lambda: saturated(logits, likelihood="token"),
        lambda: linearized_margin(logits, gram, torch.zeros(2), likelihood="token"),
        lambda: Probe(model.from_embeddings, x, words, likelihood="token", linearization="exact"),
        lambda: probe_of().linearized,
        probe_of().reading.check_margins,
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    with pytest.raises(ValueError, match="`fisher_spectral_norm` and the metrics of curvature can be measured"):
        _ = probe_of().labels
