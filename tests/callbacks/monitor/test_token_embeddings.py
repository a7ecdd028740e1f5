"""Networks that rearrange their token ids before they embed them, or embed something else, too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_robust import Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor.batch_reading import read_batch
from lightning_robust.callbacks.monitor.token_places import places_in
from lightning_robust.functional import fim_spectral_norm, linearize
from tests.helpers.networks import random
from tests.helpers.training import robustness_warnings, trainer

DEFAULTS: dict[str, Any] = dict.fromkeys(("input_std", "input_mean", "valid_range", "chunk_size", "loss_fn"))


class Reader(LightningModule):
    """Embeds its ids in an order of its own, and reads them in the order of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(30, 5), nn.Linear(5, 6), nn.Linear(6, 3)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(number, *parameter.shape))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def of_embeddings(self, x: Tensor) -> Tensor:
        place = torch.arange(1.0, x.shape[1] + 1, dtype=x.dtype)[:, None]
        z: Tensor = self.head((torch.tanh(self.layer(x)) * place).mean(dim=1))
        return z

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input_ids))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Needed by Lightning."""


class TimeFirst(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input_ids.t()).transpose(0, 1))


class Copied(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input=input_ids.t().contiguous()).transpose(0, 1))


class Flattened(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input_ids.reshape(-1)).view(*input_ids.shape, -1))


class Cut(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input_ids[:, :4]))


class CutInFront(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input_ids[:, -4:].t()).transpose(0, 1))


class Padded(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(F.pad(input_ids, (0, 3), value=0)))


class WithClass(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(F.pad(input_ids, (1, 0), value=1)))


class InTwoParts(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(torch.cat([self.words(input_ids[:, :2]), self.words(input_ids[:, 2:])], dim=1))


class TypesToo(Reader):
    """Token types share the embedding, as in GPT-2."""

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input_ids) + self.words(token_type_ids.clone()))


# how each network gets from the embeddings (N, T, D) of its ids to those that it reads
KINDS: dict[type[Reader], Callable[[Reader, Tensor], Tensor]] = {
    Reader: lambda _, x: x,
    TimeFirst: lambda _, x: x,
    Copied: lambda _, x: x,
    Flattened: lambda _, x: x,
    Cut: lambda _, x: x[:, :4],
    CutInFront: lambda _, x: x[:, -4:],
    Padded: lambda net, x: torch.cat([x, net.words.weight[0].detach().expand(len(x), 3, -1)], dim=1),
    WithClass: lambda net, x: torch.cat([net.words.weight[1].detach().expand(len(x), 1, -1), x], dim=1),
    InTwoParts: lambda _, x: x,
    TypesToo: lambda net, x: x + net.words(token_types(len(x))).detach(),
}


def token_types(num_texts: int, length: int = 6) -> Tensor:
    return (torch.arange(length) > 2).long().expand(num_texts, -1)


def ids(num_texts: int, length: int = 6) -> Tensor:
    return torch.randint(2, 30, (num_texts, length), generator=torch.Generator().manual_seed(1))


def read(module: LightningModule, tokens: Tensor, **others: Tensor) -> Probe:
    batch = {"input_ids": tokens, "labels": torch.arange(len(tokens)) % 3, **others}
    return read_batch(module, batch, probe_fn=None, defaults=DEFAULTS).probe()


@pytest.mark.parametrize("num_texts", [1, 4, 6], ids=["one", "four", "as many as tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_exchanged_where_the_network_looks_its_ids_up(kind: type[Reader], num_texts: int) -> None:
    module = kind().double().eval()
    probe = read(module, ids(num_texts), token_type_ids=token_types(num_texts))
    x = module.words(ids(num_texts)).detach()
    expected = linearize(lambda v: module.of_embeddings(KINDS[kind](module, v)), x)
    torch.testing.assert_close(probe.linearized.gram, expected.gram / probe.input_std**2)
    norms = fim_spectral_norm(expected.logits, expected.gram)
    assert (norms > 1e-4).all()
    moved = x + random(3, *x.shape)
    torch.testing.assert_close(probe.outputs(moved), module.of_embeddings(KINDS[kind](module, moved)).detach())


@pytest.mark.parametrize("kind", [TimeFirst, Padded, TypesToo])
def test_padding_is_left_alone_in_any_arrangement(kind: type[Reader]) -> None:
    module = kind().double().eval()
    mask = (torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]).long()
    probe = read(module, ids(4) * mask, attention_mask=mask, token_type_ids=token_types(4))
    jacobian = torch.autograd.functional.jacobian(lambda x: probe.network.on_all()(x).sum(dim=0), probe.inputs)
    assert (jacobian[:, mask == 0] == 0).all()
    assert (jacobian[:, mask == 1].abs().sum(dim=-1) > 0).all()


def test_symmetric_ids_that_the_network_transposes_are_not_taken_for_the_ids_as_they_are() -> None:
    symmetric = torch.tensor([[5, 7], [7, 9]])
    module = TimeFirst().double().eval()
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 2\) that agrees with them in several arrangements"):
        _ = read(module, symmetric).linearized
    assert (read(Reader().double().eval(), symmetric).linearized.gram != 0).any()  # these are the same tensor
    view = read(Flattened().double().eval(), symmetric)
    assert (view.linearized.gram != 0).any()


def test_places_are_found_for_ids_of_any_number_of_dimensions() -> None:
    choices = torch.arange(24).view(2, 3, 4)  # multiple choice: texts × choices × tokens
    found = places_in(choices.view(6, 4).clone(), choices, torch.ones_like(choices))
    assert found is not None
    assert torch.equal(found, torch.arange(24).view(6, 4))
    assert places_in(choices.view(6, 4) + 1, choices, None) is None


class Mirrored(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + super().forward(input_ids.flip(1))


class ByWeight(Reader):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(F.embedding(input_ids, self.words.weight))


class Squeezed(Reader):
    """Its embeddings are not (N, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Sequential(self.words, nn.Flatten(1))  # type: ignore[assignment]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.of_embeddings(self.words(input_ids.t().contiguous()).view(6, -1, 5).transpose(0, 1))


class Decoder(nn.Module):
    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 5, _weight=words.weight)


class Translator(Reader):
    """Encoder and decoder have embeddings of their own with one weight, and nobody calls the one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Decoder(self.words), Decoder(self.words)
        self.encoder.embed_tokens.weight = self.decoder.embed_tokens.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        shifted = F.pad(input_ids[:, :-1], (1, 0), value=0)
        return self.of_embeddings(self.encoder.embed_tokens(input_ids)) * self.of_embeddings(
            self.decoder.embed_tokens(shifted)
        )


class OfItsEncoder(Translator):
    """What the error advises."""

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens


OTHERS = {
    Mirrored: r"called with the input_ids \(4, 6\).*, but it was called with a tensor of shape \(4, 6\) that is"
    r" something else. Call the network on embeddings instead: `probe_fn=lambda module, batch: Probe\(",
    ByWeight: r"but it was not called\. Call the network.*`RobustnessMonitor\(\[\"hessian_trace\"",
    Squeezed: r"but it returned \(6, 20\) instead of embeddings",
    Translator: r"Expected Embedding, which `get_input_embeddings` returns.*but it was not called."
    r" `encoder.embed_tokens` is.*`def get_input_embeddings\(self\): return self.encoder.embed_tokens`",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_network_that_embeds_anything_else_is_refused_with_the_line_to_paste(kind: type[Reader]) -> None:
    module = kind().double().eval()
    with pytest.raises(ValueError, match=OTHERS[kind]):
        _ = read(module, ids(4)).linearized


def test_the_advice_for_an_encoder_and_a_decoder_works() -> None:
    module = OfItsEncoder().double().eval()
    tokens = ids(4)
    context = module.of_embeddings(module.words(F.pad(tokens[:, :-1], (1, 0), value=0))).detach()
    x = module.words(tokens).detach()
    found, norms = read(module, tokens), []
    for row in range(4):
        own = linearize(lambda v, row=row: module.of_embeddings(v) * context[row], x[row : row + 1])
        norms.append(own.gram / found.input_std**2)
    torch.testing.assert_close(found.linearized.gram, torch.cat(norms))


@pytest.mark.parametrize("kind", [Reader, TimeFirst, Mirrored, ByWeight, Translator])
def test_curvature_needs_no_exchange(tmp_path: Path, kind: type[Reader]) -> None:
    module, tokens = kind().eval(), ids(6)
    rows = [{"input_ids": text, "labels": torch.tensor(n % 3)} for n, text in enumerate(tokens)]
    options: dict[str, Any] = {"estimator": "gauss_newton", "num_probes": 2}
    found = read(module, tokens).curvature(**options)
    plain = Probe(module, tokens, torch.arange(6) % 3).curvature(**options)
    assert found.names == plain.names
    with robustness_warnings() as messages:
        monitor = RobustnessMonitor(["hessian_trace", "fisher_spectral_norm"])
        run = trainer(monitor, root=tmp_path)
        run.validate(module, DataLoader(rows, 3), verbose=False)
    assert run.callback_metrics["robust/hessian_trace"].isfinite()
    refused = kind in OTHERS
    assert ("robust/fim_spectral_norm" in run.callback_metrics) != refused
    assert any("skipped in epoch 0 FisherSpectralNorm: ValueError" in message for message in messages) == refused
    exact = dense_traces(module, tokens)
    means = dict(zip(found.names, found.means(), strict=True))
    for name, trace in exact.items():
        assert float(means[name]) == pytest.approx(trace, rel=1e-4, abs=1e-7), name


def dense_traces(module: Reader, tokens: Tensor) -> dict[str, float]:
    """Exact Gauss–Newton traces in float64: two probes leave nothing to chance with three classes."""
    module.double()
    weights = dict(module.named_parameters())
    logits = module(tokens)
    probs, traces = logits.detach().softmax(dim=1), dict.fromkeys(weights, 0.0)
    for z, p in zip(logits, probs, strict=True):
        rows = [torch.autograd.grad(c, list(weights.values()), retain_graph=True) for c in z]
        for number, name in enumerate(weights):
            slopes = torch.stack([row[number].flatten() for row in rows])
            traces[name] += float(((p.diag() - p[:, None] * p) @ (slopes @ slopes.T)).trace()) / len(tokens)
    module.float()
    return traces
