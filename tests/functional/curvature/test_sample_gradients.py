"""Norms of per-sample gradients are those of plain backward passes, by whichever way they are computed."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_robust.functional._isolation.weights import differentiable_weights
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional.curvature import _convolution_norms, _product_norms, _use_norms
from lightning_robust.functional.curvature._sample_gradients import SampleGradients
from tests.helpers.networks import random

NUM_SAMPLES = 5


class Function(nn.Module):
    """A network that computes a function of its parts and its input."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def after(layer: nn.Module, *shape: int) -> nn.Module:
    """A layer inside a network that is curved before and after it, for inputs of a shape."""
    return Function(lambda m, x: m.layer((x * m.scale).sin()).sin(), scale=torch.rand(shape) + 0.5, layer=layer)


def conv(*args: object, **options: object) -> nn.Module:
    return after(nn.Conv2d(*args, **options), args[0], 1, 1)  # type: ignore[arg-type]


class Case(NamedTuple):
    """A network, the shape of a sample, and the weights that take another way than that of the rules."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    others: tuple[str, ...] = ()


def routed(m: nn.Module, x: Tensor) -> Tensor:
    """Tokens (N, T, 3) go to one of two experts by their contents."""
    tokens = m.stem(x).flatten(0, 1)
    out = torch.zeros_like(tokens)
    chosen = tokens[:, 0] > 0
    out[chosen], out[~chosen] = m.one(tokens[chosen]), m.two(tokens[~chosen])
    return out.view_as(x).sin()


def encoder(*, batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=batch_first)


PAIR = ("one.weight", "one.bias")
DIRECT = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "linear of few positions": Case(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5)), (2, 5)),
    "linear of many positions": Case(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (3, 4, 2)),
    "linear without bias": Case(lambda: after(nn.Linear(3, 2, bias=False), 3), (4, 3)),
    "matrix times transposed inputs": Case(lambda: after(nn.Linear(4, 2), 4), (3, 4)),
    "convolution": Case(lambda: conv(2, 3, 3, padding=1), (2, 5, 4)),
    "convolution of small maps": Case(lambda: conv(6, 7, 3, padding=1, bias=False), (6, 2, 2)),
    "convolution with a stride": Case(lambda: conv(6, 7, 3, padding=1, stride=2), (6, 4, 3)),
    "dilated convolution": Case(lambda: conv(2, 3, (2, 3), padding=(2, 0), dilation=(2, 1), stride=(1, 2)), (2, 7, 8)),
    "pointwise convolution": Case(lambda: conv(2, 3, 1, stride=2), (2, 5, 4)),
    "circular convolution": Case(lambda: conv(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 4)),
    "grouped convolution": Case(lambda: conv(4, 6, 2, groups=2, padding=1), (4, 3, 3)),
    "grouped convolution of small maps": Case(lambda: conv(12, 14, 3, groups=2, padding=1), (12, 2, 2)),
    "depthwise convolution": Case(lambda: conv(3, 6, 3, groups=3, stride=2), (3, 6, 6)),
    "convolution of sequences": Case(lambda: after(nn.Conv1d(2, 3, 3, padding=2, stride=2), 2, 1), (2, 7)),
    "convolution of volumes": Case(lambda: after(nn.Conv3d(2, 2, 2, padding=1), 2, 1, 1, 1), (2, 3, 2, 3)),
    "transposed convolution": Case(
        lambda: after(nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0)), 2, 1, 1),
        (2, 3, 4),
    ),
    "grouped transposed convolution": Case(
        lambda: after(nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), 4, 1, 1), (4, 3, 2)
    ),
    "transposed convolution of small maps": Case(
        lambda: after(nn.ConvTranspose1d(12, 14, 3, padding=1, dilation=1), 12, 1), (12, 3)
    ),
    "frames": Case(
        lambda: Function(
            lambda m, x: m.depth(m.conv(x.flatten(0, 1)).sin()).sin().unflatten(0, x.shape[:2]),
            conv=nn.Conv2d(2, 3, 2), depth=nn.Conv2d(3, 3, 2, groups=3),
        ), (3, 2, 4, 4),
    ),
    "batch normalisation": Case(lambda: after(nn.BatchNorm2d(3), 3, 1, 1), (3, 4, 2)),
    "batch normalisation of features": Case(lambda: after(nn.BatchNorm1d(3), 3), (3,)),
    "layer normalisation": Case(lambda: after(nn.LayerNorm(3), 3), (4, 3)),
    "layer normalisation of maps": Case(lambda: after(nn.LayerNorm([2, 3]), 3), (4, 2, 3)),
    "group normalisation": Case(lambda: after(nn.GroupNorm(2, 4), 4, 1), (4, 5)),
    "scales and shifts": Case(
        lambda: Function(
            lambda m, x: ((m.scale * x.sin() - m.shift).tanh() * m.factor + m.table[None]).sin(),
            scale=torch.rand(3, 1), shift=torch.rand(3), factor=torch.rand(()), table=torch.rand(3, 3),
        ), (3, 3),
    ),
    "class token": Case(
        lambda: Function(
            lambda m, x: m.out(torch.cat([m.token.expand(len(x), -1, -1), m.stem(x)], dim=1).sin()),
            token=torch.rand(1, 1, 3), stem=nn.Linear(3, 3), out=nn.Linear(3, 2),
        ), (4, 3),
    ),
    "embedding": Case(
        lambda: Function(
            lambda m, x: m.out((m.table(x.abs().mul(3).long()) + m.places).tanh()),
            table=nn.Embedding(20, 3, padding_idx=1), places=torch.rand(6, 3), out=nn.Linear(3, 2),
        ), (6,),
    ),
    "unused": Case(lambda: Function(lambda m, x: m.one(x).sin(), one=nn.Linear(3, 2), two=nn.Linear(3, 2)), (3,)),
    "attention, positions first inside": Case(lambda: encoder(batch_first=True), (3, 4)),
    "positions first": Case(
        lambda: Function(
            lambda m, x: m.encoder(x.transpose(0, 1) * m.scale + m.shift)[0],
            encoder=encoder(batch_first=False), scale=torch.rand(4), shift=torch.rand(1, 1, 4),
        ), (3, 4),
    ),
    "frozen first layer": Case(
        lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 2)), (3,)
    ),
}  # fmt: skip
INDIRECT = {
    "used twice": Case(
        lambda: Function(lambda m, x: m.one(m.one(x).sin()).sin() + m.two(x), one=nn.Linear(3, 3), two=nn.Linear(3, 3)),
        (3,), PAIR,
    ),
    "a product of weights": Case(
        lambda: Function(lambda m, x: (x @ (m.one * m.two)).sin(), one=torch.rand(3, 5), two=torch.rand(3, 5)),
        (3,), ("one", "two"),
    ),
    "weight normalisation": Case(
        lambda: Function(
            lambda m, x: m.two(m.one(x).sin()),
            one=parametrizations.weight_norm(nn.Linear(3, 4)), two=nn.Linear(4, 2),
        ), (3,), ("one.parametrizations.weight.original0", "one.parametrizations.weight.original1"),
    ),
    "two views of a sample": Case(
        lambda: Function(
            lambda m, x: m.two(m.one(torch.cat([x, x.flip(1)])).sin().view(2, len(x), 4).sum(dim=0)),
            one=nn.Linear(3, 4), two=nn.Linear(4, 2),
        ), (3,), (),
    ),
    "recurrent": Case(
        lambda: Function(lambda m, x: m.two(m.one(x)[0]), one=nn.LSTM(3, 2, batch_first=True), two=nn.Linear(2, 2)),
        (4, 3), ("one.weight_hh_l0", "one.bias_hh_l0"),
    ),
    "routed by contents": Case(
        lambda: Function(routed, stem=nn.Linear(3, 3), one=nn.Linear(3, 3), two=nn.Linear(3, 3)),
        (4, 3), (*PAIR, "two.weight", "two.bias"),
    ),
}  # fmt: skip


def norms_of(model: nn.Module, inputs: Tensor, cotangents: Tensor) -> tuple[Tensor, list[str], SampleGradients]:
    """Norms (M, N, L), the names of the weights, and what computed them."""
    with differentiable_weights(model) as weights:
        gradients = SampleGradients(SampleModel(model, None, num_samples=len(inputs)), weights, tuple(weights.tensors))
        rows = torch.arange(len(inputs))
        gradients.squared_norms(inputs, rows, cotangents)  # finds out which ways are right
        return gradients.squared_norms(inputs, rows, cotangents), list(weights.tensors), gradients


def by_hand(model: nn.Module, inputs: Tensor, cotangents: Tensor) -> Tensor:
    model.eval()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = torch.zeros(*cotangents.shape[:2], len(weights), dtype=torch.float64)
    for n in range(len(inputs)):
        outputs = model(inputs[n : n + 1]).flatten()
        for m, cotangent in enumerate(cotangents[:, n]):
            gradients = torch.autograd.grad(outputs, weights, cotangent, retain_graph=True, materialize_grads=True)
            norms[m, n] = torch.stack([gradient.double().square().sum() for gradient in gradients])
    return norms


def built(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.network().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    inputs = random(1, NUM_SAMPLES, *case.shape)
    size = model.eval()(inputs)[0].numel()
    return model, inputs, random(2, 3, NUM_SAMPLES, size)


@pytest.mark.parametrize("elements", [1, 2**20])
@pytest.mark.parametrize("name", DIRECT)
def test_rules_give_the_norms_of_plain_backward_passes(
    name: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_product_norms, _convolution_norms):
        monkeypatch.setattr(module, "ELEMENTS", elements)  # one sample at a time, or all together
    monkeypatch.setattr(SampleGradients, "_vectorised", None)  # no weight goes by another way
    model, inputs, cotangents = built(DIRECT[name])
    norms, *_ = norms_of(model, inputs, cotangents)
    torch.testing.assert_close(norms, by_hand(model, inputs, cotangents), rtol=1e-9, atol=1e-12)
    assert not norms.requires_grad


def test_single_precision_is_exact_to_its_rounding() -> None:
    """Sums of many squares, and products of pairs that cancel, must not lose digits."""
    model, inputs, _ = built(
        Case(
            lambda: nn.Sequential(
                nn.Conv2d(3, 40, 3, padding=1), nn.GELU(), nn.Conv2d(40, 40, 3, stride=2, padding=1, groups=40),
                nn.LayerNorm([40, 4, 4]), nn.Conv2d(40, 60, 3, padding=1), nn.Flatten(2), nn.Linear(16, 300),
                nn.GELU(), nn.Flatten(), nn.Linear(18_000, 10),
            ),
            (3, 8, 8),
        )
    )  # fmt: skip
    cotangents = random(2, 2, NUM_SAMPLES, 10)
    expected = by_hand(model, inputs, cotangents)
    actual, *_ = norms_of(model.float(), inputs.float(), cotangents.float())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_rules_are_not_trusted_before_they_agree_for_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, cotangents = built(DIRECT["convolution"])
    rule = _use_norms._RULES["Convolution", 1]
    monkeypatch.setitem(_use_norms._RULES, ("Convolution", 1), lambda *arguments: 1.1 * rule(*arguments))
    norms, names, gradients = norms_of(model, inputs, cotangents)
    torch.testing.assert_close(norms, by_hand(model, inputs, cotangents), rtol=1e-9, atol=1e-12)
    assert set(names) - set(gradients._direct.tensors) == {"layer.weight"}


def test_samples_without_gradients_tell_nothing_about_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, cotangents = built(DIRECT["linear"])
    rule = _use_norms._RULES["Addmm", 2]
    monkeypatch.setitem(_use_norms._RULES, ("Addmm", 2), lambda *arguments: 1.1 * rule(*arguments))
    with differentiable_weights(model) as weights:
        gradients = SampleGradients(SampleModel(model, None, num_samples=5), weights, tuple(weights.tensors))
        assert not gradients.squared_norms(inputs, torch.arange(5), 0 * cotangents).any()
        norms = gradients.squared_norms(inputs, torch.arange(5), cotangents)
    torch.testing.assert_close(norms, by_hand(model, inputs, cotangents), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", INDIRECT)
def test_weights_without_a_rule_take_another_way_and_they_alone(name: str) -> None:
    case = INDIRECT[name]
    model, inputs, cotangents = built(case)
    norms, names, gradients = norms_of(model, inputs, cotangents)
    torch.testing.assert_close(norms, by_hand(model, inputs, cotangents), rtol=1e-9, atol=1e-12)
    assert set(names) - set(gradients._direct.tensors) >= set(case.others)
