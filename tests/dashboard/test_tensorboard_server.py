"""What TensorBoard answers to the requests of its own page."""

from tests.dashboard.digits import Run
from tests.dashboard.server import Server, page_filter


def test_accuracy_chart_has_both_accuracies_and_nothing_else(server: Server, run: Run) -> None:
    (chart,) = server.charts("multiline")
    series = server.series(run.name, page_filter(chart["multiline"]["tag"]))
    epsilons = ("0.003922", "0.007843", "0.01569", "0.03137", "0")
    assert set(series) == {*(f"robust/linearized_accuracy_linf_{epsilon}" for epsilon in epsilons), "val_acc"}
    assert {len(values) for values in series.values()} == {run.epochs}


def test_every_tag_of_the_accuracy_chart_finds_a_series(server: Server, run: Run) -> None:
    (chart,) = server.charts("multiline")
    for tag in chart["multiline"]["tag"]:
        series = server.series(run.name, tag)
        assert series, tag
        assert all(series.values()), tag


def test_every_value_lies_in_its_band(server: Server, run: Run) -> None:
    charts = server.charts("margin")
    assert {chart["title"].split(" ± ")[0] for chart in charts} == {
        key.removeprefix("robust/").removesuffix("_upper") for key in run.robust_keys if key.endswith("_upper")
    }
    for chart in charts:
        (band,) = chart["margin"]["series"]
        found = server.series(run.name, page_filter([band["value"], band["lower"], band["upper"]], escape=True))
        value, lower, upper = found[band["value"]], found[band["lower"]], found[band["upper"]]
        assert len(value) == run.epochs
        assert value.keys() == lower.keys() == upper.keys()
        assert all(lower[step] <= value[step] <= upper[step] for step in value), chart["title"]
        assert any(lower[step] < upper[step] for step in value), chart["title"]
