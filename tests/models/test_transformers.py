"""Networks of transformers under the monitor, unchanged: keyword batches, padding, outputs that are objects."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.callbacks.monitor.batch_reading import read_batch
from tests.models.reference import (
    NUM_CLASSES,
    Validated,
    check_traces,
    double,
    gauss_newton_traces,
    monitored,
    spectral_norms,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed; `make test-models` does")

TEXT = {"vocab_size": 50, "pad_token_id": 0, "num_labels": NUM_CLASSES, "max_position_embeddings": 16}
LENGTHS = [5, 8, 3, 6, 8, 4]
DEFAULTS: dict[str, Any] = dict.fromkeys(("input_std", "input_mean", "valid_range", "chunk_size", "loss_fn"))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **TEXT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(**TEXT, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    return transformers.DistilBertForSequenceClassification(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **TEXT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.LlamaForSequenceClassification(config)  # type: ignore[no-any-return]


TEXTS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "distilbert": distilbert, "llama": llama}


class OfText(Validated):
    """The usual module around a model of transformers: ``self(**batch)``."""

    def logits_of(self, batch: Any) -> Tensor:
        """Logits in the validation step."""
        z: Tensor = self(**batch).logits
        return z


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights are large enough for its classes to differ."""
    torch.manual_seed(0)
    network = kind().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
        network.get_input_embeddings().weight[0] = 0  # type: ignore[operator, index]
    return network


def texts(*, token_types: bool) -> dict[str, Tensor]:
    """Padded token ids with their mask and labels."""
    mask = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 50, (6, 8), generator=torch.Generator().manual_seed(0)) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(6) % NUM_CLASSES}
    if token_types:
        batch["token_type_ids"] = (torch.arange(8) > 2).long().expand(6, -1) * mask
    return batch


@pytest.mark.filterwarnings("ignore:.*is not reliable")  # WCI of random weights
@pytest.mark.filterwarnings("ignore:.*parameters.*")
@pytest.mark.parametrize("name", TEXTS)
def test_texts_with_padding_are_measured_as_without(tmp_path: Path, name: str) -> None:
    network, batch = built(TEXTS[name]), texts(token_types=name == "bert")
    rows = [{key: entry[row] for key, entry in batch.items()} for row in range(6)]
    monitor = monitored(OfText(network), rows, tmp_path)
    copied = double(network)
    layer: Any = copied.get_input_embeddings()  # type: ignore[operator]
    expected = []
    for row, length in enumerate(LENGTHS):  # each text alone, cut to its length, by a hook that replaces embeddings
        alone = {key: entry[row : row + 1, :length] for key, entry in batch.items() if key != "labels"}

        def logits(x: Tensor, alone: dict[str, Tensor] = alone) -> Tensor:
            handle = layer.register_forward_hook(lambda *_: x)
            try:
                z: Tensor = copied(**{key: entry.expand(len(x), -1) for key, entry in alone.items()}).logits
            finally:
                handle.remove()
            return z

        expected.append(spectral_norms(logits, layer(alone["input_ids"]).detach()))
    found = monitor.per_sample["robust/fim_spectral_norm"].double()
    unit = layer.weight.detach().square().mean()  # λ per squared root mean square of the embedding
    torch.testing.assert_close(found, torch.cat(expected) * unit, rtol=1e-5, atol=0)


def xlnet() -> nn.Module:
    config = transformers.XLNetConfig(
        vocab_size=50, num_labels=NUM_CLASSES, pad_token_id=0, d_model=16, n_layer=1, n_head=2, d_inner=24
    )
    return transformers.XLNetForSequenceClassification(config)  # type: ignore[no-any-return]


def longformer() -> nn.Module:
    config = transformers.LongformerConfig(
        **TEXT | {"max_position_embeddings": 24}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, attention_window=6,
    )  # fmt: skip
    return transformers.LongformerForSequenceClassification(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, num_labels=NUM_CLASSES, pad_token_id=0, n_embd=16, n_layer=1, n_head=2, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config)  # type: ignore[no-any-return]


def bart() -> nn.Module:
    config = transformers.BartConfig(
        **TEXT, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return transformers.BartForSequenceClassification(config)  # type: ignore[no-any-return]


class OfEncoder(OfText):
    """Names the layer whose outputs are perturbed."""

    def get_input_embeddings(self) -> nn.Module:
        """The layer."""
        layer: nn.Module = self.network.model.encoder.embed_tokens  # type: ignore[union-attr, assignment]
        return layer


@pytest.mark.filterwarnings("ignore:.*is not reliable")
@pytest.mark.filterwarnings("ignore:.*mostly noise")
@pytest.mark.parametrize("num_texts", [6, 8], ids=["six", "as many as tokens"])
@pytest.mark.parametrize("kind", [xlnet, longformer, gpt2, bart])
def test_ids_that_the_network_rearranges(tmp_path: Path, kind: Callable[[], nn.Module], num_texts: int) -> None:
    network, batch = built(kind), texts(token_types=kind is gpt2)
    rows = [{key: entry[row % 6] for key, entry in batch.items()} for row in range(num_texts)]
    for row in rows:  # one token ends the text, and BART looks for it
        ids, last = row["input_ids"].clone(), int(row["attention_mask"].sum()) - 1
        ids[ids == 2] = 3
        ids[last] = 2
        row["input_ids"] = ids
    module = (OfEncoder if kind is bart else OfText)(network)
    monitor = monitored(module, rows, tmp_path, batch_size=num_texts)
    copied = double(module)
    layer: Any = copied.get_input_embeddings() if kind is bart else copied.network.get_input_embeddings()  # type: ignore[operator, union-attr]
    expected = []
    for row in rows:
        alone = {key: entry[None] for key, entry in row.items() if key != "labels"}
        base, kept = layer(alone["input_ids"]).detach(), alone["attention_mask"][0].bool()

        def logits(x: Tensor, alone: Any = alone, base: Tensor = base, kept: Tensor = kept) -> Tensor:
            full = base.repeat(len(x), 1, 1)
            full[:, kept] = x
            seen = []

            def put(_: nn.Module, args: Any, output: Tensor) -> Tensor:
                seen.append(args)
                if kind is xlnet:
                    return full.transpose(0, 1)
                if len(seen) > 1:  # token types
                    return output
                return torch.cat([full, output[:, full.shape[1] :]], dim=1)

            handle = layer.register_forward_hook(put)
            try:
                z: Tensor = copied(**{key: entry.expand(len(x), -1) for key, entry in alone.items()}).logits
            finally:
                handle.remove()
            return z

        expected.append(spectral_norms(logits, base[:, kept]))
    found = monitor.per_sample["robust/fim_spectral_norm"].double()
    unit = layer.weight.detach().square().mean()
    torch.testing.assert_close(found, torch.cat(expected) * unit, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", TEXTS)
def test_traces_of_texts_count_the_embedding(name: str) -> None:
    network, batch = built(TEXTS[name]), texts(token_types=name == "bert")
    probe = read_batch(OfText(network), dict(batch), probe_fn=None, defaults=DEFAULTS).probe()
    sums = probe.curvature(estimator="gauss_newton", num_probes=NUM_CLASSES - 1)
    copied = double(network)
    logits = copied(**{key: entry for key, entry in batch.items() if key != "labels"}).logits
    exact = gauss_newton_traces(copied, logits)
    found = {name.removeprefix("network."): float(mean) for name, mean in zip(sums.names, sums.means(), strict=True)}
    assert found.keys() == exact.keys()
    for layer, trace in exact.items():
        assert found[layer] == pytest.approx(float(trace), rel=1e-4, abs=1e-7), layer


@pytest.mark.filterwarnings("ignore:.*is not reliable")
@pytest.mark.filterwarnings("ignore:.*parameters.*")
def test_images_by_keyword(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_labels=NUM_CLASSES,
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6) % NUM_CLASSES
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]
    monitor = monitored(OfText(network), rows, tmp_path)
    copied = double(network)
    expected = spectral_norms(lambda v: copied(pixel_values=v).logits, x.double())
    torch.testing.assert_close(monitor.per_sample["robust/fim_spectral_norm"].double(), expected, rtol=1e-5, atol=0)
    check_traces(network, lambda net: net(pixel_values=x.double()).logits, x, y)


def test_padding_cannot_be_perturbed() -> None:
    network, batch = built(bert), texts(token_types=True)
    probe = read_batch(OfText(network), dict(batch), probe_fn=None, defaults=DEFAULTS).probe()
    moved = torch.where(batch["attention_mask"][..., None] == 0, 3.0, probe.inputs)
    assert torch.equal(probe.outputs(moved), probe.outputs(probe.inputs))
    expected = network(**{key: entry for key, entry in batch.items() if key != "labels"}).logits
    torch.testing.assert_close(probe.outputs(probe.inputs), expected.detach(), rtol=1e-4, atol=1e-5)
