"""No module but `fxprune.runtime.torch_internals` uses private names of torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

HOME = ROOT / "fxprune" / "runtime" / "torch_internals.py"
SOURCES = sorted(
    path
    for folder in ("fxprune", "passes")
    for path in (ROOT / folder).rglob("*.py")
    if path != HOME and ROOT / "fxprune" / "passes" not in path.parents  # a link to passes/
)
EXPERIMENTAL = ("torch.fx.experimental",)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_private_path(path: str) -> bool:
    parts = path.split(".")
    return parts[0] == "torch" and (any(map(is_private, parts)) or path.startswith(EXPERIMENTAL))


def private_names(source: str) -> list[str]:
    """Lines of a module with private names of torch: imports, attributes that it does not define, names in strings."""
    tree = ast.parse(source)
    own = defined_names(tree)
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if is_private_path(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in names if is_private_path(name)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)] if is_private(node.attr) and not is_own(node, own) else []
            names += [path for path in [ast.unparse(node)] if path in EXPERIMENTAL]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            private = re.fullmatch(r"_[a-z]\w*", node.value) and node.value not in own
            names = [node.value] if private or re.fullmatch(r"torch(\.\w+)*\._[\w.]+", node.value) else []
        found += [f"line {getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


def is_own(node: ast.Attribute, own: set[str]) -> bool:
    """Whether an attribute of `self` or `cls` is one that the module defines."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own


def defined_names(tree: ast.Module) -> set[str]:
    """Names of attributes and methods that a module's classes define."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) == "self" else set()
        elif isinstance(node, ast.ClassDef):
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            names |= {field.id for field in fields if isinstance(field, ast.Name)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_private_names(path: Path) -> None:
    found = private_names(path.read_text(encoding="utf-8"))
    assert found == [], f"{path.relative_to(ROOT)}: use a public name, or add an entry to {HOME.relative_to(ROOT)}"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._guards import TracingContext",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
        "torch._assert(x)",
        "torch.utils._pytree.tree_leaves(x)",
        "layer._parameters['weight']",
        "getattr(layer, '_conv_forward')",
        "gm.meta['_user_preserved_attributes']",
        "kind = 'torch._dynamo.eval_frame.OptimizedModule'",
        "class A(nn.Module):\n    def f(self):\n        return self._modules",
    ],
)
def test_private_names_are_found(line: str) -> None:
    assert len(private_names(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import torch.utils.data",
        "layer.__dict__",
        "from fxprune.passes._inside import x",
        "class A:\n    def __init__(self):\n        self._kept = 1\n        print(self._kept)",
        "'pass model._orig_mod and compile the result again'",
    ],
)
def test_other_names_are_not_found(line: str) -> None:
    assert private_names(line) == []
