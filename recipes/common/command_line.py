"""Command lines of the scripts: the docstring is the help, and every option shows its default."""

from __future__ import annotations

import argparse


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the docstring and appends defaults to the help of options."""


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints a script's docstring above its options."""
    return argparse.ArgumentParser(description=docstring, formatter_class=_Formatter)
