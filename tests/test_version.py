"""The package knows its version, installed or not."""

import importlib.metadata
import runpy
import tomllib
from pathlib import Path
from typing import NoReturn

import pytest

import lightning_robust

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_the_version_is_that_of_the_project() -> None:
    assert lightning_robust.__version__ == tomllib.loads(PYPROJECT.read_text())["project"]["version"]


def test_a_source_tree_that_is_not_installed_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert runpy.run_path(lightning_robust.__file__)["__version__"] == "unknown"
