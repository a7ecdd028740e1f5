import pytest
import torch
from torch import Tensor

from lightning_robust import FisherRaoMargin, Probe
from lightning_robust.functional import class_shielding, trace_fisher_rao_paths
from tests.helpers.networks import Linear, build
from tests.helpers.oracles import Scaled
from tests.helpers.recording import Recorder


def measured(metric: FisherRaoMargin, probe: Probe) -> dict[str, Tensor]:
    metric.update(probe)
    return metric.compute()


def test_values_are_means_over_paths_and_class_values_agree_with_class_shielding() -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=30)
    values = measured(FisherRaoMargin(), Probe(model, inputs, targets))
    paths = trace_fisher_rao_paths(model, inputs, labels=targets)
    assert paths.success.all()
    torch.testing.assert_close(values["fisher_rao_margin"], paths.margins.double().mean())
    torch.testing.assert_close(values["fisher_rao_margin_bound"], paths.bound.double().mean())
    excess = paths.margins.double().sum() / paths.bound.double().sum()
    torch.testing.assert_close(values["fisher_rao_margin_excess"], excess)
    assert excess > 1
    torch.testing.assert_close(values["fisher_rao_margin_l2"], paths.l2.double().mean())
    torch.testing.assert_close(values["fisher_rao_margin_linf"], paths.linf.double().mean())
    torch.testing.assert_close(values["shielded"], paths.shielded.sum() / paths.has_left.sum().double())
    assert values["fisher_rao_margin_unreached"] == 0
    stderr = paths.margins.double().mean(dim=1).std() / len(inputs) ** 0.5  # each sample has as many paths
    torch.testing.assert_close(values["fisher_rao_margin_stderr"], stderr)
    table = class_shielding(paths, 10)
    for key, estimate in (("fisher_rao_margin", table.margin), ("shielded", table.shielded)):
        for label, value in enumerate(estimate.value):
            if value.isnan():
                assert f"{key}_per_class/{label}" not in values
            else:
                torch.testing.assert_close(values[f"{key}_per_class/{label}"], value)
    assert any(f"shielded_per_class/{label}" in values for label in range(10))


def test_paths_that_do_not_arrive_count_only_as_unreached() -> None:
    model, inputs, targets = build("mlp", num_samples=20)
    values = measured(FisherRaoMargin(max_steps=1), Probe(model, inputs, targets))
    paths = trace_fisher_rao_paths(model, inputs, labels=targets, max_steps=1)
    assert 0 < paths.success.sum() < paths.success.numel()
    torch.testing.assert_close(values["fisher_rao_margin_unreached"], (~paths.success).double().mean())
    torch.testing.assert_close(values["fisher_rao_margin"], paths.margins[paths.success].double().mean())


def test_if_no_path_arrives_only_the_unreached_share_is_returned() -> None:
    flat = Linear(torch.zeros(3, 4), torch.tensor([1.0, 0.0, 0.0]))
    values = measured(FisherRaoMargin(), Probe(flat, torch.ones(5, 4), torch.zeros(5, dtype=torch.long)))
    assert values == {"fisher_rao_margin_unreached": 1.0}


def test_misclassified_samples_have_margin_zero_and_no_shields() -> None:
    model, inputs, _ = build("mlp", num_samples=5)
    wrong = (model.eval()(inputs).argmax(dim=1) + 1) % 6
    values = measured(FisherRaoMargin(), Probe(model, inputs, wrong))
    assert values["fisher_rao_margin"] == values["fisher_rao_margin_l2"] == 0
    assert "shielded" not in values
    assert "fisher_rao_margin_excess" not in values


def test_paths_can_aim_at_only_the_most_probable_other_classes() -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=10)
    probe = Probe(model, inputs, targets)
    others = model.eval()(inputs).detach().scatter(1, targets[:, None], -torch.inf)
    paths = probe.fisher_rao_paths(num_targets=2, options=FisherRaoMargin().options)
    assert torch.equal(paths.targets, others.argsort(dim=1, descending=True)[:, :2])
    values = measured(FisherRaoMargin(num_targets=2), probe)
    torch.testing.assert_close(values["fisher_rao_margin"], paths.margins.double().mean())
    many = measured(FisherRaoMargin(num_targets=1000), Probe(model, inputs, targets))
    every = measured(FisherRaoMargin(), Probe(model, inputs, targets))
    torch.testing.assert_close(many["fisher_rao_margin"], every["fisher_rao_margin"])


def test_options_and_units_reach_the_paths() -> None:
    model, inputs, targets = build("mlp", num_samples=6)
    options = {"damping": 0.5, "step_length": 0.1, "max_euclidean_step": 0.05, "max_steps": 30, "solver": "cg"}
    units = {"input_std": 0.3, "input_mean": 0.1, "valid_range": (-1.0, 1.0), "chunk_size": 11}
    expected = trace_fisher_rao_paths(model, inputs, labels=targets, **options, **units)
    values = measured(FisherRaoMargin(**options), Probe(model, inputs, targets, **units))
    torch.testing.assert_close(values["fisher_rao_margin"], expected.margins[expected.success].double().mean())


def test_metrics_of_the_same_options_share_the_paths() -> None:
    model, inputs, targets = build("mlp", num_samples=4)
    recorder = Recorder(model)
    probe = Probe(recorder, inputs, targets)
    measured(FisherRaoMargin(), probe)
    passes = len(recorder.record.batch_sizes)
    measured(FisherRaoMargin(per_class=False), probe)
    assert len(recorder.record.batch_sizes) == passes
    measured(FisherRaoMargin(damping=1.0), probe)
    assert len(recorder.record.batch_sizes) > passes


def test_single_classes_can_be_left_out() -> None:
    model, inputs, targets = build("mlp", num_samples=6)
    values = measured(FisherRaoMargin(per_class=False), Probe(model, inputs, targets))
    assert not any("/" in key for key in values)


def test_distances_have_a_direction_and_margins_detours_and_shields_have_none() -> None:
    metric = FisherRaoMargin()
    for key in ("fisher_rao_margin_l2", "fisher_rao_margin_l2_lower", "fisher_rao_margin_linf"):
        assert metric.direction(key) is True
    for key in (
        "fisher_rao_margin",
        "fisher_rao_margin_lower",
        "fisher_rao_margin_per_class/3",
        "shielded",
        "shielded_per_class/3",
    ):
        assert metric.direction(key) is None


def test_the_margin_grows_with_confidence_and_the_distance_does_not() -> None:
    model, inputs, _ = build("mlp", num_samples=20)
    targets = model.eval()(inputs).argmax(dim=1)
    cautious, confident = (
        measured(FisherRaoMargin(num_targets=1), Probe(Scaled(model, scale), inputs, targets)) for scale in (0.5, 5.0)
    )
    assert confident["fisher_rao_margin"] > 2 * cautious["fisher_rao_margin"]
    assert confident["fisher_rao_margin_l2"] < cautious["fisher_rao_margin_l2"]


def test_another_number_of_classes_is_refused() -> None:
    metric = FisherRaoMargin()
    for name in ("mlp", "recurrent"):
        model, inputs, targets = build(name, num_samples=2)
        if name == "mlp":
            metric.update(Probe(model, inputs, targets))
            continue
        with pytest.raises(ValueError, match="Expected logits of 6 classes, as before, but got 4"):
            metric.update(Probe(model, inputs, targets))


def test_the_state_does_not_grow_with_samples() -> None:
    metric = FisherRaoMargin(num_targets=1)
    model, inputs, targets = build("mlp", num_samples=12)
    for x, y in zip(inputs.split(3), targets.split(3), strict=True):
        metric.update(Probe(model, x, y))
        assert sum(row.numel() for row in metric.rows) == 42 * 6
