"""The documentation is true as far as a machine can tell: its code runs, and what it names exists.

Of README.md and every page of docs/:

- Blocks marked ``python`` run, page by page, in one namespace. A block marked ``text`` right after one is its printed
  output: words must agree exactly, and numbers within 10 % (``text varies``: words alone, for wall times).
- An HTML comment that begins with ``<!-- python`` runs in its place, too: set-up and checks that readers do not see.
- Blocks marked ``yaml`` are configuration files of LightningCLI, which trains a step with them.
- Commands, in blocks marked ``bash`` and in running text, name targets, modules and options that exist.
- Links, anchors, figures and paths of files lead somewhere.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jsonargparse
import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import TensorDataset

from lightning_robust import RobustnessDriftStopping, RobustnessMonitor
from lightning_robust.metrics import METRICS
from recipes.common.classifier import DigitsClassifier
from recipes.common.digits import DigitsDataModule

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(
    r"^```(?P<language>\S*)(?P<info>[^\n]*)\n(?P<shown>.*?)^```$|^<!-- python\n(?P<hidden>.*?)^-->$", re.M | re.S
)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 6,  # the least that a drift stopper can do with
}


class Block(NamedTuple):
    """A block that is shown, in a language, or is "hidden"; and the line of its page on which its code begins."""

    language: str
    info: str
    code: str
    line: int

    @property
    def is_python(self) -> bool:
        return self.language in ("python", "hidden")


class AcceptedError(Exception):
    """A command line was understood."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            match["language"] or "hidden",
            (match["info"] or "").strip(),
            match["shown"] if match["hidden"] is None else match["hidden"],
            text.count("\n", 0, match.start()) + 2,
        )
        for match in BLOCK.finditer(text)
    ]


def prose_of(page: Path) -> str:
    """The page without its blocks."""
    return BLOCK.sub("", page.read_text())


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks_of(page))]


def section(page: Path, heading: str) -> str:
    """From a heading of the second rank to the next one."""
    sections = re.split(r"^## (.+)\n", page.read_text(), flags=re.M)
    return dict(zip(sections[1::2], sections[2::2], strict=True))[heading]


@pytest.fixture
def _small_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Trainer without settings of its own is quiet and trains for few epochs; nothing is left behind."""
    quiet = functools.partial(Trainer, default_root_dir=tmp_path, **QUIET)
    monkeypatch.setattr(lightning.pytorch, "Trainer", quiet)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what LightningCLI 2.6 calls
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.chdir(tmp_path)
    with isolate_rng():
        yield


def everyday_names() -> dict[str, Any]:
    """What a page may take for granted, as a reader has it: a module, its data, and some labelled samples."""
    torch.manual_seed(0)
    datamodule = DigitsDataModule(num_train=64)
    datamodule.setup("fit")
    images, labels = datamodule.val_set.tensors
    datamodule.setup = lambda stage: None  # type: ignore[method-assign]
    datamodule.val_set = TensorDataset(images[:64], labels[:64])
    return {
        "Trainer": lightning.pytorch.Trainer,
        "model": DigitsClassifier(),
        "datamodule": datamodule,
        "inputs": images[:32],
        "targets": labels[:32],
        "torch": torch,
        "nn": nn,
    }


def assert_same_output(printed: str, shown: str, *, varies: bool) -> None:
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    if not varies:
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.02), printed


@pytest.mark.usefixtures("_small_trainings")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # several trainings of a page share one
@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_runs_and_prints_what_is_shown(page: Path) -> None:
    module = types.ModuleType("documentation")
    module.__dict__.update(everyday_names())
    blocks = blocks_of(page)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if not block.is_python:
            continue
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, module.__dict__)
        if following is not None and following.language == "text":
            assert_same_output(printed.getvalue(), following.code, varies=following.info == "varies")
        else:
            assert printed.getvalue() == "", f"{page}:{block.line} prints what the page does not show"


@pytest.mark.usefixtures("_small_trainings")
@pytest.mark.parametrize("page", pages_with("yaml"), ids=name_of)
def test_configuration_files_train_a_step(page: Path, tmp_path: Path) -> None:
    for block in blocks_of(page):
        if block.language != "yaml":
            continue
        folder = tmp_path / str(block.line)
        folder.mkdir()
        config = folder / "config.yaml"
        config.write_text(block.code)
        cli = LightningCLI(
            DigitsClassifier,
            DigitsDataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            trainer_defaults={
                **QUIET,
                "max_epochs": 1,
                "limit_train_batches": 1,
                "limit_val_batches": 1,
                "default_root_dir": folder,
            },
            args=["--config", str(config)],
        )
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        assert any(key.startswith("robust/") for key in cli.trainer.callback_metrics)


def commands_of(page: Path) -> list[str]:
    """Commands of blocks, with their continuation lines joined, and those of the running text."""
    fenced = "\n".join(block.code for block in blocks_of(page) if block.language == "bash").replace("\\\n", " ")
    spans = re.findall(r"`((?:make|pip install|(?:\S*/)?python -m) [^`]+)`", prose_of(page))
    return [line for line in [*fenced.splitlines(), *spans] if line.strip()]


def accept(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a command to the point at which its arguments have been understood."""
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets), command
    elif program == "pip":
        (package,) = arguments[1:]
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", package)) <= extras.keys(), command
    elif program == "export":
        pass
    else:
        assert program.endswith("python"), command
        assert arguments[0] == "-m", command
        assert importlib.util.find_spec(arguments[1]), command
        monkeypatch.setattr(sys, "argv", arguments[1:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # another test has imported the module
            with pytest.raises(AcceptedError):
                runpy.run_module(arguments[1], run_name="__main__")


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

        def parse_args(
            self: argparse.ArgumentParser, *args: Any, parse: Any = parser.parse_args, **options: Any
        ) -> NoReturn:
            parse(self, *args, **options)
            raise AcceptedError

        monkeypatch.setattr(parser, "parse_args", parse_args)
    readers_own = types.ModuleType("my_module")
    readers_own.MyNetwork = type("MyNetwork", (nn.Module,), {"__module__": "my_module"})
    monkeypatch.setitem(sys.modules, "my_module", readers_own)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(ROOT)
    for command in commands_of(page):
        accept(command, monkeypatch)


def test_there_are_commands_to_check_and_wrong_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(len(commands_of(page)) for page in ALL_PAGES) > 15
    for wrong in ("make sense", "pip install '.[nothing]'", "python -m recipes.nothing"):
        with pytest.raises(AssertionError):
            accept(wrong, monkeypatch)
    with pytest.raises(SystemExit):
        accept("python -m recipes.validity --zoo nothing", monkeypatch)


def anchors(page: Path) -> set[str]:
    """Anchors of its headings, as forges generate them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_and_figures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    shown = [block for block in blocks_of(page) if block.language != "hidden"]
    assert {block.language for block in shown} <= {"python", "text", "yaml", "bash"}
    assert len(re.findall(r"^```", page.read_text(), re.M)) == 2 * len(shown)


@pytest.mark.parametrize("page", ["docs/guarantees.md", "CONTRIBUTING.md"])
def test_the_files_that_are_named_exist(page: str) -> None:
    names = re.findall(
        r"(?:^|`)((?:tests|lightning_robust|recipes|configs|docs)/[\w./-]*)", (ROOT / page).read_text(), re.M
    )
    assert len(names) > 12
    assert [name for name in names if not (ROOT / name).exists()] == []


def options_in(page: str, heading: str) -> set[str]:
    """Names in the first columns of the tables of a section."""
    cells = re.findall(r"^\| (`[^|]+`) \|", section(ROOT / page, heading), re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_option_is_documented_and_no_other() -> None:
    monitor, stopper = (
        set(inspect.signature(callback).parameters) for callback in (RobustnessMonitor, RobustnessDriftStopping)
    )
    assert options_in("docs/metrics.md", "Options of the monitor") == monitor
    assert options_in("docs/metrics.md", "Metrics") >= set(METRICS)
    assert options_in("docs/stopping.md", "Other keys and options") == stopper


def test_readme_is_a_front_door() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 140
    for page in PAGES[1:]:
        assert f"]({name_of(page)})" in readme.read_text()


@pytest.mark.parametrize(
    ("heading", "lines"),
    [
        ("Normalised images", ["input_mean=", "input_std=", "valid_range="]),
        (
            "Choose a checkpoint by robustness",
            ['monitor="robust/linearized_accuracy_linf_0.03137"', 'mode="max"', "auto_insert_metric_name=False"],
        ),
        (
            "Dictionaries, texts, and any other batch",
            ["probe_fn=", "`robustness_probe(self, batch)`", "`pixel_values`"],
        ),
    ],
)
def test_newcomers_find_the_line_they_need(heading: str, lines: list[str]) -> None:
    text = section(ROOT / "README.md", heading)
    assert [line for line in lines if line not in text] == []
