"""Rules for the source of the whole package, checked on its syntax trees."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_robust

ROOT = Path(lightning_robust.__file__).parent
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
# Lowest layer first, with the packages it may import besides torch, the standard library and the layers below it.
LAYERS: dict[str, set[str]] = {
    "functional": set(),
    "samples": set(),
    "probe": set(),
    "metrics": {"torchmetrics"},
    "dashboard": {"lightning", "tensorboard", "matplotlib"},
    "callbacks": {"lightning", "torchmetrics"},
    "cli": {"lightning", "jsonargparse"},
    "__init__": set(),
}
DRAWS = {"bernoulli", "exponential", "multinomial", "normal", "poisson", "uniform"}
DRAWS |= {"rand", "randint", "randn", "random", "randperm"}


def imports() -> Iterator[tuple[str, str]]:
    """(file, dotted name) of every import; ``from a import b`` counts as ``a.b``."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((file, f"{'.' * node.level}{node.module}.{alias.name}") for alias in node.names)


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, dotted function, call) of every call."""
    for file, tree in TREES.items():
        yield from ((file, ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def may_import(file: str, name: str) -> bool:
    order, layer = list(LAYERS), file.replace(".", "/").split("/")[0]
    package, _, rest = name.partition(".")
    if package == "lightning_robust":
        return order.index(rest.split(".")[0]) <= order.index(layer)
    return package in {"torch", *LAYERS[layer], *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("file", "name", "allowed"),
    [
        ("functional/linearize.py", "torch.nn", True),
        ("functional/linearize.py", "math", True),
        ("functional/linearize.py", "torchmetrics.Metric", False),
        ("functional/linearize.py", "lightning_robust.probe.Probe", False),
        ("callbacks/monitor.py", "lightning_robust.probe.Probe", True),
        ("callbacks/monitor.py", "numpy", False),
    ],
)
def test_upward_and_foreign_imports_are_recognised(file: str, name: str, allowed: bool) -> None:
    assert may_import(file, name) is allowed


def test_imports_point_one_way() -> None:
    assert [(file, name) for file, name in imports() if not may_import(file, name)] == []


def test_lightning_is_imported_by_one_name() -> None:
    names = [(file, name) for file, name in imports() if name.startswith(("lightning.", "pytorch_lightning"))]
    assert names
    assert [(file, name) for file, name in names if not name.startswith("lightning.pytorch.")] == []


def test_derivatives_are_switched_on_in_one_place() -> None:
    modes = ("enable_grad", "inference_mode", "set_grad_enabled")
    used = {file for file, name, _ in calls() if name.endswith(modes)} | {f for f, n in imports() if n.endswith(modes)}
    assert used == {"functional/_isolation/context.py"}


def test_no_gradient_is_ever_written_to_a_parameter() -> None:
    assert [(file, name) for file, name, _ in calls() if name.endswith(".backward")] == []


def is_global_draw(name: str, call: ast.Call) -> bool:
    owner, _, function = name.rpartition(".")
    if owner in ("np.random", "numpy.random") or function in ("seed_everything", "seed", "set_rng_state"):
        return True
    if owner == "random":
        return function != "Random"
    if function.startswith("manual_seed"):
        return "Generator" not in owner and owner != "generator"
    if function.removesuffix("_like").removesuffix("_") in DRAWS and (owner == "torch" or function.endswith("_")):
        return not any(keyword.arg == "generator" for keyword in call.keywords)
    return False


@pytest.mark.parametrize(
    ("source", "is_global"),
    [
        ("torch.rand(3)", True),
        ("torch.rand(3, generator=generator)", False),
        ("torch.randn_like(x)", True),
        ("x.normal_()", True),
        ("x.normal_(generator=generator)", False),
        ("torch.manual_seed(0)", True),
        ("torch.Generator().manual_seed(0)", False),
        ("np.random.rand()", True),
        ("random.shuffle(items)", True),
        ("random.Random(0)", False),
        ("seed_everything(0)", True),
    ],
)
def test_draws_from_global_generators_are_recognised(source: str, is_global: bool) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert is_global_draw(ast.unparse(call.func), call) is is_global


def test_no_number_is_drawn_from_a_global_generator() -> None:
    assert [(file, name, call.lineno) for file, name, call in calls() if is_global_draw(name, call)] == []
    assert [(file, name) for file, name in imports() if name.startswith("random.") and name != "random.Random"] == []


SHARED = {"_validation", "_isolation"}  # folders that `functional` and every layer above it may use


def private_modules(name: str) -> Iterator[str]:
    """Yield the folder of each module with a leading underscore in a dotted name."""
    parts = name.split(".")
    modules = parts if (ROOT.parent / "/".join(parts)).with_suffix(".py").exists() else parts[:-1]
    yield from ("/".join(parts[1:i]) for i, part in enumerate(modules) if part.startswith("_") and part not in SHARED)


def test_a_module_with_an_underscore_is_imported_from_its_own_folder_only() -> None:
    ours = [(file, name) for file, name in imports() if name.startswith("lightning_robust.")]
    assert any(list(private_modules(name)) for _, name in ours)
    foreign = [
        (file, name)
        for file, name in ours
        if any(folder != file.rpartition("/")[0] for folder in private_modules(name))
    ]
    assert foreign == []
