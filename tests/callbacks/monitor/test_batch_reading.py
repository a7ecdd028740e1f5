"""How batches of ordinary modules are read: what is the input, what else the network takes, and how it is called."""

import logging
from collections import UserDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lightning_robust import FisherSpectralNorm, Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor.batch_reading import read_batch
from lightning_robust.functional import fim_spectral_norm, linearize
from tests.helpers.networks import random
from tests.helpers.training import robustness_warnings, trainer

DEFAULTS: dict[str, Any] = dict.fromkeys(("input_std", "input_mean", "valid_range", "chunk_size", "loss_fn"))


class Module(nn.Module):
    """The parts of a LightningModule that reading a batch needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 12), nn.Linear(12, 6)


def test_a_probe_function_is_called_with_whole_batches_and_its_open_options_are_filled_in() -> None:
    module, ids = Module(), torch.arange(8)
    seen = []

    def probe_fn(pl_module: Any, batch: Any) -> Probe:
        seen.append(batch)
        return Probe(pl_module.head, pl_module.embedding(batch["ids"]), batch["label"], input_std=3.0)

    given = {"ids": ids, "label": ids % 6}
    defaults = {"input_std": 2.0, "input_mean": 1.0, "valid_range": None, "chunk_size": 4, "loss_fn": None}
    probe = read_batch(module, given, probe_fn=probe_fn, defaults=defaults).probe()  # type: ignore[arg-type]
    assert seen == [given]
    assert (probe.model, probe.input_std, probe.input_mean, probe.chunk_size) == (module.head, 3.0, 1.0, 4)
    assert torch.equal(probe.inputs, module.embedding(ids))


def test_a_plain_function_is_assumed_to_call_the_module() -> None:
    module = Module()
    batch = read_batch(
        module,  # type: ignore[arg-type]
        (torch.ones(2, 12), torch.tensor([0, 1])),
        probe_fn=lambda pl_module, batch: Probe(lambda x: pl_module.head(x), *batch),  # noqa: PLW0108
        defaults={},
    )
    assert batch.options["module"] is module


def test_a_batch_without_one_target_per_input_is_refused_before_it_is_cut() -> None:
    with pytest.raises(ValueError, match=r"`targets` to hold one class index per sample.*\(3,\)"):
        read_batch(Module(), (torch.ones(3, 12), torch.tensor([0, 1])), probe_fn=None, defaults={})  # type: ignore[arg-type]


# --- text -------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A network of token ids in the manner of transformers: positions, a mask for attention, an object of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 8, padding_idx=0), nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(number, *parameter.shape) / 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        x = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return self.of_embeddings(x, attention_mask)

    def of_embeddings(self, x: Tensor, attention_mask: Tensor | None) -> Any:
        mask = torch.ones_like(x[..., 0]) if attention_mask is None else attention_mask
        hidden = self.layer(x, src_key_padding_mask=mask == 0)
        logits = self.head((hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
        return SimpleNamespace(loss=None, logits=logits, hidden_states=hidden)


class Text(LightningModule):
    """Subclasses differ in how their forward pass is called."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Needed by Lightning."""


class ByName(Text):
    def forward(self, **batch: Tensor) -> Any:
        return self.encoder(**batch)


class ByPosition(Text):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.encoder(input_ids, attention_mask)


class AfterAnother(Text):
    def forward(self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return self.encoder(input_ids, kwargs["attention_mask"])


class WholeBatch(Text):
    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.encoder(batch["input_ids"], batch["attention_mask"])


class Annotated(Text):
    def forward(self, tokens: Mapping[str, Tensor]) -> Any:
        return self.encoder(tokens["input_ids"], tokens["attention_mask"])


class WithLabels(Text):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return self.encoder(input_ids, attention_mask, labels)


class WithoutForward(Text):
    """Its step would call ``self.encoder``."""


TEXTS = [ByName, ByPosition, AfterAnother, WholeBatch, Annotated, WithLabels, WithoutForward]
LENGTHS = [3, 6, 4, 5, 2, 6, 3]


def texts() -> dict[str, Tensor]:
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 20, (len(LENGTHS), 6), generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(LENGTHS)) % 3}


def spectral_norms(encoder: Encoder) -> Tensor:
    """λ of each text alone, without padding, by a dense Jacobian in float64, per root mean square of the embedding."""
    encoder, norms = encoder.double().eval(), []
    for row, length in enumerate(LENGTHS):
        ids = texts()["input_ids"][row : row + 1, :length]
        x = encoder.words(ids) + encoder.positions.weight[:length]

        def logits(x: Tensor) -> Tensor:
            z: Tensor = encoder.of_embeddings(x, None).logits[0]
            return z

        jacobian = torch.autograd.functional.jacobian(logits, x.detach()).reshape(3, -1)
        p = logits(x).detach().softmax(dim=0)
        information = jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian
        norms.append(torch.linalg.eigvalsh(information)[-1] * encoder.words.weight.detach().square().mean())
    encoder.float()
    return torch.stack(norms)


def paired(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return batch, batch.pop("labels")


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(
    "wrap", [dict, UserDict, lambda batch: (batch, batch.pop("labels"))], ids=["dict", "user", "pair"]
)
def test_texts_are_measured_from_their_embeddings_on(kind: type[Text], wrap: Callable[..., Any]) -> None:
    if kind is WithLabels and wrap not in (dict, UserDict):
        return  # the labels have no name there
    module = kind().eval()
    batch = read_batch(module, wrap(texts()), probe_fn=None, defaults=DEFAULTS)
    metric = FisherSpectralNorm()
    metric.update(batch.probe())
    metric.compute()
    expected = spectral_norms(module.encoder)
    torch.testing.assert_close(metric.per_sample["fim_spectral_norm"].double(), expected, rtol=1e-4, atol=1e-9)
    assert (expected > 1e-5).all()


def test_curvature_is_that_of_all_weights_those_of_the_embedding_included() -> None:
    module, batch = ByName().double().eval(), texts()
    probe = read_batch(module, dict(batch), probe_fn=None, defaults=DEFAULTS).probe()
    parts = probe.curvature(num_probes=16)
    found = dict(zip(parts.names, parts.means(), strict=True))
    stderr = dict(zip(parts.names, parts.probe_stderr(), strict=True))
    dense = dense_traces(module, batch)
    assert found.keys() == dense.keys()
    for name, trace in dense.items():
        assert abs(float(found[name]) - trace) <= 3 * float(stderr[name]) + 1e-9, name
    assert abs(dense["encoder.words.weight"]) > 0.1


def dense_traces(module: Text, batch: dict[str, Tensor]) -> dict[str, float]:
    """The trace of the Hessian of the mean loss, entry by entry."""
    weights, traces = dict(module.named_parameters()), {}
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
        logits = module.encoder(batch["input_ids"], batch["attention_mask"]).logits
    loss = nn.functional.cross_entropy(logits, batch["labels"])
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        rows = [
            torch.autograd.grad(slope, weight, retain_graph=True, materialize_grads=True)[0].flatten()[i]
            for i, slope in enumerate(gradient.flatten())
        ]
        traces[name] = float(torch.stack(rows).sum())
    return traces


class Careless(Text):
    """Averages over padding, too."""

    def forward(self, input_ids: Tensor) -> Tensor:
        z: Tensor = self.encoder.head(self.encoder.words(input_ids).mean(dim=1))
        return z


def test_padding_is_never_perturbed() -> None:
    probe = read_batch(Careless().eval(), texts(), probe_fn=None, defaults=DEFAULTS).probe()
    jacobian = torch.autograd.functional.jacobian(lambda x: probe.network.on_all()(x).sum(dim=0), probe.inputs)
    assert (jacobian[:, texts()["attention_mask"] == 0] == 0).all()
    assert (jacobian[:, texts()["attention_mask"] == 1] != 0).any()
    moved = torch.where(texts()["attention_mask"][..., None] == 0, 9.0, probe.inputs)
    assert torch.equal(probe.outputs(moved), probe.outputs(probe.inputs))


class OnlyIds(Text):
    def forward(self, input_ids: Tensor) -> Any:
        return self.encoder(input_ids)


def test_a_mask_that_the_module_does_not_take_must_have_a_row_per_text_all_the_same() -> None:
    given = texts() | {"attention_mask": texts()["attention_mask"][:-1]}
    with pytest.raises(ValueError, match=r"one row per sample.*\(7, ...\), but 'attention_mask' has shape \(6, 6\)"):
        read_batch(OnlyIds(), given, probe_fn=None, defaults=DEFAULTS)


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Cut each batch to its longest text, as tokenisers pad."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    longest = int(batch["attention_mask"].sum(dim=1).max())
    return {name: entry if name == "labels" else entry[:, :longest] for name, entry in batch.items()}


def test_a_monitor_measures_texts_of_many_lengths_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, batch = ByName(), texts()
    rows = [{name: entry[row] for name, entry in batch.items()} for row in range(len(LENGTHS))]
    monitor = RobustnessMonitor(["fisher_spectral_norm", "hessian_trace", "adversarial_accuracy"], on_error="raise")
    run = trainer(monitor, root=tmp_path)
    for _ in range(2):
        caplog.clear()
        with robustness_warnings() as messages, caplog.at_level(logging.INFO, "lightning.pytorch"):
            run.validate(module, DataLoader(rows, 2, collate_fn=collate), verbose=False)
        assert messages == []
        assert len([record for record in caplog.records if "root mean square" in record.getMessage()]) == 1
        assert run.callback_metrics["robust/num_samples"] == len(LENGTHS)
        found = monitor.per_sample["robust/fim_spectral_norm"]
        torch.testing.assert_close(found.double(), spectral_norms(module.encoder), rtol=1e-4, atol=1e-9)


# --- other batches ----------------------------------------------------------------------------------------------------


class Scaled(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 6)

    def forward(self, image: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        z: Tensor = self.head(image) * (scale[:, None] if isinstance(scale, Tensor) else scale)
        return z


def entries(**others: Any) -> dict[str, Any]:
    return {"image": random(0, 4, 12, dtype=torch.float32), "label": torch.arange(4), **others}


def test_entries_that_the_module_takes_are_passed_on_and_others_are_not() -> None:
    scale = torch.arange(1.0, 5.0)
    given = entries(scale=scale, path=["a", "b", "c", "d"], other=torch.ones(4), weight=None)
    batch = read_batch(Scaled(), given, probe_fn=None, defaults=DEFAULTS)
    assert batch.extras.keys() == {"scale"}
    plain = read_batch(Scaled(), entries(), probe_fn=None, defaults=DEFAULTS)
    assert plain.extras == {}
    module = Scaled()
    probe = read_batch(module, given, probe_fn=None, defaults=DEFAULTS).probe()
    expected = torch.stack([linearize(module.head, given["image"]).gram[row] * scale[row] ** 2 for row in range(4)])
    torch.testing.assert_close(probe.linearized.gram, expected)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ({"features": torch.ones(4, 3), "scale": None}, None),  # the module takes the image
        ({"scale": torch.ones(3)}, r"'scale' of the batch.*each of the 4 samples, but got a tensor of shape \(3,\)"),
        ({"scale": torch.tensor(2.0)}, r"'scale'.*a tensor of shape \(\).*`probe_fn=lambda module, batch: Probe"),
        ({"scale": [1.0] * 4}, r"'scale'.*but got list.*extras="),
    ],
)
def test_what_has_no_row_per_sample_is_refused(others: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        assert torch.equal(
            read_batch(Scaled(), entries(**others), probe_fn=None, defaults=DEFAULTS).inputs, entries()["image"]
        )
        return
    with pytest.raises(MisconfigurationException, match=sentence):
        read_batch(Scaled(), entries(**others), probe_fn=None, defaults=DEFAULTS)


def test_two_entries_that_could_be_the_input_leave_the_choice_to_the_user() -> None:
    given = {"img": torch.ones(2, 3), "features": torch.ones(2, 5), "y": torch.tensor([0, 1])}
    with pytest.raises(
        MisconfigurationException,
        match=r"'img' \(2, 3\) and 'features' \(2, 5\). Choose which.*Probe\(module, batch\['img'\], batch\['y'\]\)",
    ):
        read_batch(Scaled(), given, probe_fn=None, defaults=DEFAULTS)


class Binary(LightningModule):
    def __init__(self, *criteria: nn.Module) -> None:
        super().__init__()
        self.network, self.criteria = nn.Linear(12, 1), nn.ModuleList(criteria)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.network(x)
        return z

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Needed by Lightning."""


@pytest.mark.parametrize(
    "targets", [torch.tensor([0.0, 1, 1, 0]), torch.tensor([[0.0], [1], [1], [0]]), torch.tensor([0, 1, 1, 0])]
)
def test_the_criterion_of_a_binary_classifier_is_found(targets: Tensor) -> None:
    module = Binary(nn.BCEWithLogitsLoss())
    probe = read_batch(module, (random(0, 4, 12), targets), probe_fn=None, defaults=DEFAULTS).probe()
    assert probe.is_binary
    z = module.double()(probe.inputs).detach()
    torch.testing.assert_close(probe.linearized.logits, torch.cat([0 * z, z], dim=1))
    norm = fim_spectral_norm(probe.linearized.logits, probe.linearized.gram)
    p = z[:, 0].sigmoid()
    torch.testing.assert_close(norm, p * (1 - p) * module.network.weight.detach().square().sum())


def test_without_an_evident_criterion_the_line_to_paste_is_shown(tmp_path: Path) -> None:
    for module in (Binary(), Binary(nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss())):
        rows = [(x, torch.tensor([float(n % 2)])) for n, x in enumerate(random(0, 6, 12, dtype=torch.float32))]
        with robustness_warnings() as messages:
            trainer(RobustnessMonitor(), root=tmp_path).validate(module, DataLoader(rows, 3), verbose=False)
        assert any("`loss_fn=nn.BCEWithLogitsLoss()`" in message for message in messages), messages


class Many(Binary):
    """Four classes, and a binary criterion of an auxiliary task."""

    def __init__(self) -> None:
        super().__init__(nn.BCEWithLogitsLoss())
        self.head, self.asked = nn.Linear(12, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        z: Tensor = self.head(x)
        return z


@pytest.mark.parametrize("targets", [[0, 1, 1, 0], [1], [0, 0], [0, 2, 3, 1]])
def test_an_auxiliary_criterion_makes_no_binary_classifier(targets: list[int]) -> None:
    module, x = Many(), random(0, len(targets), 12, dtype=torch.float32)
    for _ in range(3):
        probe = read_batch(module, (x, torch.tensor(targets)), probe_fn=None, defaults=DEFAULTS).probe()
        assert not probe.is_binary
        assert probe.linearized.logits.shape == (len(targets), 4)
    module.asked = 0
    read_batch(module, (x, torch.tensor(targets)), probe_fn=None, defaults=DEFAULTS)
    assert module.asked == 0  # once for a module


def test_a_sorted_loader_is_measured_whole(tmp_path: Path) -> None:
    rows = [(x, torch.tensor(n * 4 // 24)) for n, x in enumerate(random(0, 24, 12, dtype=torch.float32))]
    run = trainer(RobustnessMonitor(["fisher_spectral_norm"], on_error="raise"), root=tmp_path)
    run.validate(Many(), DataLoader(rows, 6), verbose=False)
    assert run.callback_metrics["robust/num_samples"] == 24


def test_one_logit_and_integer_targets_make_a_binary_classifier_in_objects_too() -> None:
    class Wrapped(Binary):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(x))

    for kind in (Binary, Wrapped):
        batch = (random(0, 3, 12, dtype=torch.float32), torch.tensor([0, 1, 1]))
        assert read_batch(kind(nn.BCEWithLogitsLoss()), batch, probe_fn=None, defaults=DEFAULTS).probe().is_binary


# --- lines to paste ---------------------------------------------------------------------------------------------------


class Step(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Needed by Lightning."""


class Masked(Step):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z: Tensor = self.head(x * mask)
        return z


class ImageAndTable(Step):
    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        z: Tensor = self.head(torch.cat([image.flatten(1), features], dim=1))
        return z


class TableFirst(Step):
    def forward(self, features: Tensor, *, image: Tensor) -> Tensor:
        z: Tensor = self.head(torch.cat([image.flatten(1), features], dim=1))
        return z


class Everything(ImageAndTable):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["image"], batch["features"])


class Plain(Step):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(x)
        return z


class Strict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, pixel_values: Tensor, scale: float | Tensor = 2.0) -> Tensor:
        z: Tensor = self.head(pixel_values) * scale
        return z


class PassesOn(Step):
    def __init__(self) -> None:
        super().__init__()
        self.model = Strict()

    def forward(self, **inputs: Any) -> Tensor:
        z: Tensor = self.model(**inputs)
        return z


class NamesItsInput(PassesOn):
    def forward(self, pixel_values: Tensor, **inputs: Any) -> Tensor:
        z: Tensor = self.model(pixel_values, **inputs)
        return z


X, Y, MASKS = random(0, 8, 12, dtype=torch.float32), torch.arange(8) % 3, (random(1, 8, 12) > 0).float()
TWO = {"image": X[:, :8].view(8, 2, 4), "features": X[:, 8:], "label": Y}


def rows_of(batch: Any) -> list[Any]:
    """The samples of a batch, from which a loader makes it anew."""
    if isinstance(batch, dict):
        columns = {key: rows_of(value) for key, value in batch.items()}
        return [{key: column[row] for key, column in columns.items()} for row in range(8)]
    if isinstance(batch, tuple):
        return list(zip(*map(rows_of, batch), strict=True))
    return list(batch)


def measured(module: LightningModule, batch: Any, root: Path, **options: Any) -> tuple[Any, list[str]]:
    monitor = RobustnessMonitor(["fisher_spectral_norm"], **options)
    with robustness_warnings() as messages:
        trainer(monitor, root=root).validate(module, DataLoader(rows_of(batch), 4), verbose=False)
    return monitor.per_sample.get("robust/fim_spectral_norm"), messages


UNREAD = {
    "a mask": (Masked, (X, MASKS, Y)),
    "a mask inside": (Masked, ((X, MASKS), Y)),
    "an index": (Plain, (X, Y, torch.arange(8.0))),
    "views": (Plain, ((X, X, X), Y)),
    "targets inside": (Plain, (X, {"weight": torch.rand(8), "label": Y})),
    "own names": (Plain, {"photo": X, "species": Y}),
    "image and table": (ImageAndTable, TWO),
    "table and image": (TableFirst, TWO),
    "image and table in one": (Everything, TWO),
    "a column": (Plain, (X, Y[:, None])),
    "a column of numbers": (Plain, {"x": X, "y": Y[:, None] + 1.0 - 1.0}),
    "one-hot": (Plain, ({"x": X}, nn.functional.one_hot(Y, 3).float())),
    "another name": (Masked, {"x": X, "y": Y, "visible": MASKS}),
}


@pytest.mark.parametrize("name", UNREAD)
def test_the_line_for_a_batch_that_cannot_be_read_can_be_pasted(tmp_path: Path, name: str) -> None:
    kind, batch = UNREAD[name]
    module = kind()
    found, messages = measured(module, batch, tmp_path)
    assert found is None
    line = next(part for part in messages[0].split("`") if part.startswith("probe_fn=lambda"))
    names: dict[str, Any] = {"Probe": Probe}
    probe_fn = eval(line.removeprefix("probe_fn="), names)
    found, messages = measured(module, batch, tmp_path, probe_fn=probe_fn)
    assert messages == []
    x = {"image and table": TWO["image"], "image and table in one": TWO["image"], "table and image": TWO["features"]}
    inputs, logits = X, module.head
    if kind is Masked:
        expected = linearize(lambda v: logits(v * MASKS[: len(v)]), X)
        norms = fim_spectral_norm(expected.logits, expected.gram)
    elif name in x:
        inside = slice(8) if x[name] is TWO["image"] else slice(8, None)
        z = logits(X).detach()
        weight = logits.weight[:, inside].detach()
        norms = fim_spectral_norm(z, (weight @ weight.T).expand(8, 3, 3).contiguous())
    else:
        expected = linearize(logits, inputs)
        norms = fim_spectral_norm(expected.logits, expected.gram)
    torch.testing.assert_close(found, norms.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [PassesOn, NamesItsInput])
@pytest.mark.parametrize("scaled", [False, True])
def test_entries_that_the_network_inside_does_not_take_are_left_out(
    tmp_path: Path, kind: type[PassesOn], scaled: bool
) -> None:
    module = kind()
    batch = {"pixel_values": X, "labels": Y, "idx": torch.arange(8), "token_type_ids": torch.zeros(8, 12)}
    scale = torch.arange(1.0, 9.0)[:, None]
    if scaled and kind is PassesOn:
        batch["scale"] = scale
    found, messages = measured(module, batch, tmp_path)
    assert messages == []
    factor = scale if "scale" in batch else torch.full((8, 1), 2.0)
    gram = (module.model.head.weight @ module.model.head.weight.T).detach() * factor[..., None] ** 2
    norms = fim_spectral_norm(module.model.head(X).detach() * factor, gram)
    torch.testing.assert_close(found, norms.float(), rtol=1e-4, atol=1e-7)


class Careful(Step):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x, mask=None)  # type: ignore[no-any-return]


class Dictionary(Step):
    def forward(self, image: Tensor) -> Tensor:
        raise RuntimeError("no such thing")


def test_errors_of_the_network_show_the_batch_as_it_is(tmp_path: Path) -> None:
    _, messages = measured(Careful(), (X, Y), tmp_path)
    assert "unexpected keyword argument 'mask'" in messages[0]  # not an entry of the batch: nothing is left out
    _, messages = measured(Dictionary(), {"image": X, "label": Y}, tmp_path)
    assert "`probe_fn=lambda module, batch: Probe(module.head, batch['image'], batch['label'])`" in messages[0]
    _, messages = measured(
        Masked(), {"x": X, "y": Y}, tmp_path, probe_fn=lambda module, batch: Probe(module, batch["x"], batch["y"])
    )
    assert "Probe(module, inputs, targets, extras={'mask': mask})" in messages[0]


def test_classes_of_pixels_are_told_what_can_be_measured(tmp_path: Path) -> None:
    batch = (X, Y[:, None, None].expand(8, 2, 2))
    _, messages = measured(Plain(), batch, tmp_path)
    line = '`RobustnessMonitor(["hessian_trace", "weight_curvature_index"], loss_fn=nn.CrossEntropyLoss())`'
    assert line in messages[0]


class Words(Step):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"words": nn.Embedding(20, 12)})

    def forward(self, input_ids: Tensor) -> Tensor:
        z: Tensor = self.head(self.text["words"](input_ids).mean(dim=1))
        return z


def test_token_ids_without_a_named_embedding_show_the_method_to_define(tmp_path: Path) -> None:
    batch = {"input_ids": torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(0)), "labels": Y}
    _, messages = measured(Words(), batch, tmp_path)
    assert "`def get_input_embeddings(self): return self.text.words`" in messages[0]
    _, messages = measured(Plain(), (X.byte(), Y), tmp_path)
    assert "get_input_embeddings" not in messages[0]
