"""Does a rewritten model still hold to what it promised?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.errors import PlanError
from fxprune.graph import structure_of
from fxprune.plan import Plan
from fxprune.text import first_few


def verify_graph(name: str, before: list[str], gm: fx.GraphModule, gone: set[str]) -> None:
    """Check one rewritten graph: well-formed, called as before, and nothing left of what should have gone.

    Parameters
    ----------
    name : str
        Path of the island, for the message.
    before : list of str
        Placeholder names of the graph before the rewrite.
    gm : GraphModule
        The graph after it.
    gone : set of str
        Nodes that the plan removes.

    Raises
    ------
    PlanError
        If a check fails: the plan does not describe regions of this graph.
    """
    gm.graph.lint()
    left = sorted(gone & {node.name for node in gm.graph.nodes})
    if left:
        raise PlanError(
            f"island {name or '<model>'!r}: {first_few(left)} should be gone but something still reads them"
        )
    after = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    if after != before:
        raise PlanError(f"island {name or '<model>'!r}: its arguments changed from {before} to {after}")


def verify_weights(original: nn.Module, pruned: nn.Module, plan: Plan, narrowed: Mapping[str, tuple[int, ...]]) -> None:
    """Check that what is left of the weights is the original's, under its names, and that the removed ones are gone.

    Parameters
    ----------
    original, pruned : Module
        Before and after.
    plan : Plan
        What was carried out, for the message.
    narrowed : mapping of str to tuple of int
        Shapes of the weights that are meant to have a new one.

    Raises
    ------
    PlanError
        If a key is new, or a tensor has another shape than it should.
    """
    shapes = {key: tuple(value.shape) for key, value in original.state_dict().items() if hasattr(value, "shape")}
    expected = shapes | {key: shape for key, shape in narrowed.items() if key in shapes}
    for key, value in pruned.state_dict().items():
        if isinstance(value, torch.Tensor) and expected.get(key) != tuple(value.shape):
            raise PlanError(f"the plan for {len(plan.removed)} regions changed weight {key!r}; report this as a bug")


def inventory(network: nn.Module) -> dict[str, str]:
    """Say what a network is made of: its modules by path, the shapes of its state by key, in words.

    A graph counts with what it does. Batch norms of all kinds count as one: `SyncBatchNorm` computes the same.

    Examples
    --------
    >>> inventory(nn.Linear(2, 3))
    {'': 'a Linear', 'weight': 'a tensor (3, 2)', 'bias': 'a tensor (3,)'}
    """
    found = {path: _describe(module) for path, module in network.named_modules(remove_duplicate=False)}
    for key, value in network.state_dict().items():
        found[key] = f"{_TENSOR} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{_TENSOR} of no shape"
    return found


_TENSOR = "a tensor"


def _describe(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):
        return f"the graph {hashlib.sha256(repr(structure_of(module.graph)).encode()).hexdigest()[:8]}"
    kind = _BatchNorm if isinstance(module, _BatchNorm) else type(module)
    return f"a {kind.__qualname__}"


def differences(before: Mapping[str, str], network: nn.Module) -> list[str]:
    """Say, part by part, what is no longer as an earlier inventory has it; empty if all is.

    A module that came or went shows in its tensors; if it has none (a loss), it does not matter.
    """
    now, lines = inventory(network), []
    for name in {**before, **now}:
        was, new = before.get(name), now.get(name)
        if was == new or (None in (was, new) and not str(was or new).startswith(_TENSOR)):
            continue
        lines.append(f"{name!r} is new" if was is None else f"{name!r} was {was} and is {new or 'gone'}")
    return lines
