"""Rules that hold for the source of the whole package, checked on its syntax trees."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning_robust

ROOT = Path(lightning_robust.__file__).parent
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
# From the bottom to the top, with what each may import beside torch, the standard library and the layers below it.
LAYERS: dict[str, set[str]] = {
    "functional": set(),
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


def test_no_number_is_drawn_from_a_global_generator() -> None:
    assert [(file, name, call.lineno) for file, name, call in calls() if is_global_draw(name, call)] == []
    assert [(file, name) for file, name in imports() if name.startswith("random.") and name != "random.Random"] == []


SHARED = {"_validation", "_isolation"}  # rooms that all of `functional` and the layers above it use


def private_modules(name: str) -> Iterator[str]:
    """The folder of each module in a dotted name that begins with an underscore."""
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
