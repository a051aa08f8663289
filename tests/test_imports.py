"""The arrows of the house: who may import whom, in Python and in C++, read from the sources themselves."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/saccade"

# From the bottom up: a module imports from its own layer and those before it. A package stands as a whole.
LAYERS = [
    {"_C", "kernels", "checks"},
    {
        "maskbase",
        "masks",
        "join",
        "graph",
        "graph_forms",
        "locality",
        "patterns",
        "position",
        "scores",
        "dropout",
        "layout",
    },
    {
        "problem",
        "terms",
        "packed",
        "ops",
        "ops_triton",
        "bodies",
        "gather",
        "transforms",
        "autograd",
        "autograd_weights",
        "op_gradients",
        "backends",
    },
    {"functional", "reference", "explain"},
    {"nn", "integrations", "accelerate", "testing"},
    {"__init__", "__main__", "doctor"},
    {"benchmarks"},
]
LAYER = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The command line starts the benchmarks; nothing else knows them.
UPWARD = {("__main__", "benchmarks"), ("doctor", "benchmarks")}
BACKENDS = {"cpu", "cuda", "reference", "triton"}


def sources() -> dict[str, Path]:
    """Dotted name below saccade -> file, for the package and the kernels."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            found[prefix + ".".join(path.relative_to(folder).with_suffix("").parts)] = path
    return found


SOURCES = sources()


def exists(name: str) -> bool:
    return name in SOURCES or f"{name}.__init__" in SOURCES or name == "_C"


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names that a module imports anywhere, in functions too."""
    package = ["saccade", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def own(name: str) -> str:
    """The module of ours that an imported name lives in: `saccade.masks.Band` -> `masks`."""
    parts = name.split(".")[1:]
    while parts and not exists(".".join(parts)):
        parts.pop()
    return ".".join(parts) or "__init__"


def edges(module: str, tree: ast.AST) -> set[str]:
    return {own(name) for name in imported(module, tree) if name.split(".")[0] == "saccade"}


def complaints(module: str, targets: set[str]) -> list[str]:
    """What is wrong with these imports of a module of ours."""
    top = module.split(".")[0]
    if top not in LAYER:
        return [f"{module} has no layer: give it one in LAYERS"]
    found = []
    for target in sorted(targets):
        below = target.split(".")[0]
        if LAYER.get(below, len(LAYERS)) > LAYER[top] and (top, below) not in UPWARD:
            found.append(f"{module} imports {target}, which stands above it")
        pair = [name.split(".")[1] if name.startswith("backends.") else "" for name in (module, target)]
        if pair[0] != pair[1] and BACKENDS.issuperset(pair):
            found.append(f"{module} imports {target}: a backend knows no other backend")
        if top == "kernels" and below != "kernels":
            found.append(f"{module} imports {target}: kernels know no module")
    return found


def module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import, those under `if` and `try` included, those under TYPE_CHECKING not."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        yield node
        for child in ast.iter_child_nodes(node):
            pending.extend([child] if isinstance(child, ast.stmt) else getattr(child, "body", []))


def foreign(module: str, tree: ast.Module) -> set[str]:
    """Top-level packages imported at import time that are neither Python's, nor torch, nor ours."""
    names = set()
    for node in module_level(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {name.split(".")[0] for name in imported(module, ast.Module([node], []))}
    return names - set(sys.stdlib_module_names) - {"torch", "saccade"}


@pytest.mark.parametrize("module", SOURCES)
def test_arrows_point_down(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text())
    assert not complaints(module, edges(module, tree))


@pytest.mark.parametrize("module", [name for name in SOURCES if not name.startswith("kernels.")])
def test_package_imports_with_torch_alone(module: str) -> None:
    assert not foreign(module, ast.parse(SOURCES[module].read_text()))


@pytest.mark.parametrize(
    ("module", "code", "word"),
    [
        ("masks", "from .functional import attention", "above"),
        ("masks", "def plot():\n    from saccade import nn", "above"),
        ("backends.cpu", "from . import reference", "no other backend"),
        ("backends.cpu", "from saccade.backends.reference import run", "no other backend"),
        ("kernels.tile", "from saccade.masks import Band", "know no module"),
        ("problem", "import saccade", "above"),
        ("functional", "import saccade.benchmarks.cases", "above"),
        ("novelty", "import math", "no layer"),
    ],
)
def test_wrong_arrows_are_found(module: str, code: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (module, "functional", "nn.__init__", "backends.reference", "masks", "benchmarks.cases"):
        monkeypatch.setitem(SOURCES, name, PACKAGE)
    assert word in " ".join(complaints(module, edges(module, ast.parse(code))))


def test_foreign_imports_are_found() -> None:
    code = "try:\n    import numpy\nexcept ImportError:\n    import rich\nclass A:\n    import triton\n"
    assert foreign("masks", ast.parse(code)) == {"numpy", "rich", "triton"}
    harmless = "if TYPE_CHECKING:\n    import numpy\ndef f():\n    import rich\nimport torch.nn, math\n"
    assert not foreign("masks", ast.parse(harmless))


# Headers a file may include, by folder: kernels know no framework, CPU and CUDA do not know each other.
FORBIDDEN_INCLUDES = {
    "cpu": r"torch/|ATen/|c10/|pybind11/|Python\.h|cuda/",
    "cuda": r"torch/|ATen/|c10/|pybind11/|Python\.h|cpu/",
    "": r"ATen/|c10/|Python\.h",
}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_only_ops_knows_torch(path: Path) -> None:
    folder = path.parent.name if path.parent.name in ("cpu", "cuda") else ""
    forbidden = FORBIDDEN_INCLUDES[folder]
    if folder == "" and path.name not in ("ops.cpp", "cuda_ops.cpp", "torch_call.h"):
        forbidden += r"|torch/"
    if folder == "" and path.name != "module.cpp":
        forbidden += r"|pybind11/"
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M)
    assert not [name for name in includes if re.match(forbidden, name)]
