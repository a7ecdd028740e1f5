"""The class-shielding study runs on any network and images, and reports what it finds."""

import csv
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import auto_cli

from lightning_robust.functional import class_shielding, trace_fisher_rao_paths
from recipes.benchmarks import fisher_rao as benchmark_fisher_rao
from recipes.class_shielding import __main__ as recipe
from recipes.class_shielding import report as shielding_report
from recipes.common.cifar import DATA, TEST
from recipes.common.images import IMAGENET, evenly, normalised, read_images
from recipes.common.networks import CifarResNet, initialised, with_weights
from recipes.common.statistics import spearman
from tests.helpers.networks import random, random_linear

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = ("classes.csv", "shielding_landscape.png", "path_matrix.png", "margins.png")


def launch(*args: str) -> None:
    auto_cli(recipe.study, args=list(args), as_positional=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_default_studies_digits_and_writes_a_table_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(CONFIGS / "class_shielding.yaml")
    launch("--config", config, "--num_images", "30", "--epochs", "2", "--folder", str(tmp_path))
    out = capsys.readouterr().out
    headings = ("shields %", "mean FR margin", "mean ‖δ‖₂", "rank", "is shielded %", "margin / bound")
    assert all(heading in out for heading in headings)
    assert "published" not in out
    assert "paths left their class" in out
    for name in FILES:
        assert str(tmp_path / name) in out
        head = (tmp_path / name).read_bytes()[:4]
        assert head == (b"clas" if name.endswith("csv") else b"\x89PNG")
    rows = rows_of(tmp_path / "classes.csv")
    assert [row["class"] for row in rows] == [str(c) for c in range(10)]
    assert sorted(int(row["vulnerability_rank"]) for row in rows) == list(range(1, 11))
    for row in rows:
        assert float(row["excess"]) >= 1
        assert f"{float(row['margin']):.2f} ± {float(row['margin_stderr']):.2f}" in out


def study_of_noise(tmp_path: Path, *options: str) -> list[dict[str, str]]:
    """Study a random network and random images, with the class names of CIFAR-10, and return the written rows."""
    network = initialised(CifarResNet(8), seed=0)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(30) % 10)
    files = ("--images", str(tmp_path / "images.npz"), "--weights", str(tmp_path / "weights.pth"))
    config = str(CONFIGS / "class_shielding_cifar10.yaml")
    launch("--config", config, "--network.init_args.depth", "8", *files, "--folder", str(tmp_path), *options)
    return rows_of(tmp_path / "classes.csv")


def test_published_figures_stand_beside_those_of_cifar10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = study_of_noise(tmp_path, "--num_images", "20", "--max_steps", "3")
    out = capsys.readouterr().out
    assert "published: shielding" in out
    assert "Spearman correlation with the published figures" in out
    assert re.search(r"margin -?\d.\d\d \[-?\d.\d\d, -?\d.\d\d\], l2", out)
    (airplane,) = (line for line in out.splitlines() if line.startswith("airplane"))
    assert airplane.split()[-4:] == ["58.2", "3.21", "0.98", "1"]
    assert [row["class"] for row in rows] == list(shielding_report.CIFAR10)
    assert {row["margin"] for row in rows if row["success"] == "nan"} == {"0.0"}  # all of them misclassified


def test_unit_steps_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = study_of_noise(tmp_path, "--num_images", "20", "--mode", "unit_steps", "--damping", "1")
    out = capsys.readouterr().out
    assert "mean steps" in out
    assert "margin / bound" not in out
    means = [float(row["margin"]) * 18 for row in rows if row["success"] == "1.0"]  # two images, nine paths from each
    assert means
    assert all(mean == pytest.approx(round(mean)) for mean in means)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "none.npz"), "--network and --images together"),
        (("--network.class_path", "recipes.common.networks.CifarResNet"), "--network and --images together"),
        (("--mean", "[0.5]"), "--network and --images together"),
    ],
)
def test_a_network_without_images_or_the_reverse_is_refused_before_anything_is_computed(
    options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        launch(*options)


def test_errors_name_images_weights_and_class_names_that_do_not_fit(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.npz" for name in ("floats", "unlabelled")}
    np.savez(files["floats"], x=np.zeros((4, 8, 8), dtype=np.float32), y=np.zeros(4))
    np.savez(files["unlabelled"], x=np.zeros((4, 8, 8), dtype=np.uint8))
    for path in files.values():
        with pytest.raises(ValueError, match=r"to hold `x`, bytes of shape .* but got `x`, \w+ of shape \(4, 8, 8\)"):
            read_images(path)
    torch.save({"state_dict": initialised(CifarResNet(8), seed=0).state_dict()}, tmp_path / "weights.ckpt")
    with_weights(CifarResNet(8), tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"Expected weights of the \d+ shapes that CifarResNet has"):
        with_weights(CifarResNet(14), tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="Expected 10 names in --class_names, as many as classes, but got 2"):
        study_of_noise(tmp_path, "--num_images", "6", "--class_names", "[a, b]")


def test_images_are_read_with_and_without_channels_and_normalised(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for shape in ((4, 8, 8, 3), (4, 8, 8)):
        pixels, labels = generator.integers(0, 256, shape, dtype=np.uint8), generator.integers(0, 10, 4)
        np.savez(tmp_path / "images.npz", x=pixels, y=labels.astype(np.int32))
        images, classes = read_images(tmp_path / "images.npz")
        assert (images.dtype, classes.dtype) == (torch.uint8, torch.int64)
        assert classes.tolist() == labels.tolist()
        mean, std = [0.4, 0.5, 0.6][: images.shape[1]], [0.2, 0.3, 0.25][: images.shape[1]]
        expected = (pixels.reshape(4, 8, 8, -1) / 255 - mean) / std
        actual = normalised(images, mean, std).permute(0, 2, 3, 1)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32))
        torch.testing.assert_close(normalised(images, None, None), images / 255)


def test_images_are_spread_evenly_over_the_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    images, chosen = evenly(torch.arange(83), labels, 20)
    assert torch.bincount(chosen).tolist() == [9, 8, 3]
    assert torch.equal(labels[images], chosen)
    assert len(evenly(torch.arange(83), labels, 1000)[0]) == 83


def test_tracing_in_groups_gives_the_margins_of_tracing_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = initialised(CifarResNet(8), seed=0)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = network.eval()(images).argmax(dim=1)
    options: dict[str, Any] = {"max_steps": 3}
    monkeypatch.setattr(recipe, "GROUP", 2)
    paths = recipe.trace(network, images, labels, quiet=True, **options)
    expected = trace_fisher_rao_paths(network, images, labels=labels, **options)
    torch.testing.assert_close(paths.margins, expected.margins, rtol=1e-3, atol=1e-3)


def test_rank_correlations_take_ties_and_leave_out_unknown_values() -> None:
    values = torch.tensor([0.1, 5.0, 2.0, 3.0])
    assert spearman(values, values.exp()) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert spearman(values, torch.tensor([1.0, 4.0, 3.0, 2.0])) == pytest.approx(0.8)
    assert math.isnan(spearman(values, torch.zeros(4)))
    first = torch.tensor([torch.nan, *range(1, 11), 10.0])  # the last two are tied: ranks 1 to 9, 10.5 and 10.5
    second = torch.tensor([9.0, *range(1, 12)])
    ranks = np.array([*range(1, 10), 10.5, 10.5])
    expected = np.corrcoef(ranks, np.arange(1, 12))[0, 1]
    assert expected < 1
    assert spearman(first, second) == pytest.approx(expected)


@pytest.mark.long
def test_the_benchmark_times_a_plain_loop_beside_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    options = ["--depth", "8", "--num-images", "1", "--rounds", "1", "--max-steps", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    benchmark_fisher_rao.main()
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "ratio: median " in out
    assert out.count("paths per second, absolute error") == 2


def test_the_plain_loop_of_the_benchmark_finds_the_same_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_fisher_rao, "STEP_LENGTH", 0.05)  # Euler's method needs short steps to converge
    monkeypatch.setattr(benchmark_fisher_rao, "SHARE_OF_THE_WAY", 0.03)
    network = random_linear(0, num_classes=10, num_features=20, dtype=torch.float32).requires_grad_(requires_grad=False)
    images = random(1, 1, 20, dtype=torch.float32)
    paths = trace_fisher_rao_paths(network, images)
    rows = zip(images.split(1), paths.source.tolist(), paths.targets.tolist(), strict=True)
    alone = [[benchmark_fisher_rao.one_path(network, x, y, k, max_steps=200) for k in aims] for x, y, aims in rows]
    error = (paths.margins - torch.tensor(alone)).abs()
    assert error.max() < 0.03 * paths.margins.mean()


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    not (DATA / "models").is_dir(), reason="no CIFAR-10 classifiers; set LIGHTNING_ROBUST_DATA to a folder of them"
)
def test_on_a_resnet_of_cifar10_paths_arrive_and_vehicles_are_not_the_shields() -> None:
    """The documentation reports this for 200 images; here are 30 of them."""
    images, labels = evenly(*read_images(DATA / TEST), 30)
    mean, std = IMAGENET
    inputs = normalised(images, mean, std)
    network = with_weights(CifarResNet(20), DATA / "models" / "cifar10_resnet20.pth")
    units: dict[str, Any] = {"input_mean": mean, "input_std": std, "valid_range": (0.0, 1.0)}
    paths = recipe.trace(network, inputs, labels, quiet=True, **units)
    assert paths.success.all()
    assert (paths.margins >= paths.bound - 1e-4).all()
    assert paths.shielded.sum() < 0.05 * paths.has_left.sum()
    counted = recipe.trace(network, inputs, labels, quiet=True, mode="unit_steps", damping=10.0, **units)
    found = class_shielding(counted, 10)
    assert counted.shielded.sum() > 0.1 * counted.has_left.sum()
    vehicles, others = [0, 8, 9], [2, 3]  # airplane, ship, truck; bird, cat
    assert found.interception.value[vehicles].mean() < found.interception.value[others].mean()
