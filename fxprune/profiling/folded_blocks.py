"""Finds blocks whose branches are folded into one layer after training, and counts their cost after the fold.

Such a block (as RepVGG has) has a method that folds it. A branch costs something in training only, and the
method of a block without one of its branches fails. So such a block is one unit: it goes whole or stays whole. What
counts is its cost after the fold.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import warn_user
from fxprune.graph.fx_utils import join_path, node_parameters
from fxprune.graph.interpreters import Graphs, NodeName
from fxprune.graph.records import FoldedUnit
from fxprune.profiling.flops_params import count_flops
from fxprune.runtime.torch_internals import tree_leaves

FOLD_METHODS: dict[str, str] = {
    "fuse_convs": "convolutions with parallel branches, ultralytics",
    "reparameterize": "MobileOne, RepVGG and FastViT of timm",
    "switch_to_deploy": "RepVGG and diverse branch blocks",
    "convert_to_deploy": "RepVGG blocks of RT-DETR and D-FINE",
    "fuse_repvgg_block": "convolutions with parallel branches, WongKinYiu",
    "merge_kernel": "RepLKNet",
    "merge_dilated_branches": "UniRepLKNet",
    "fuse": "RepViT, EfficientViT, large depthwise kernels of ultralytics",
}
"""Methods that fold the branches of a module into one layer, in place or by returning that layer, and who has them.

A module with such a method is a block if the method needs no arguments, its result gives the same output, and it has
one new layer with weights. It may have several new ones if no module inside has such a method: otherwise it is a model
of blocks, not a block. Methods that only remove outputs, as of detection heads, do not make a block.
"""
TOLERANCE = 1e-3
"""Largest relative difference (root of mean squares) of the outputs before and after the fold."""


@dataclass(frozen=True)
class FoldedBlock:
    """A block whose branches are folded into one layer after training.

    Attributes
    ----------
    unit : FoldedUnit
        Its method and the parameters of its branches.
    flops_saved : int
        Floating point operations that the fold saves in all calls of the observed run.
    params_saved : int
        Number of values in parameters that the fold saves. Like `flops_saved`, 0 if only norms and scales are folded.
    """

    unit: FoldedUnit
    flops_saved: int
    params_saved: int


def find_folded_blocks(model: nn.Module, run: Callable[[], Any]) -> dict[str, FoldedBlock]:
    """Find the blocks of a model that have a method which folds their branches into one layer.

    Parameters
    ----------
    model : Module
        The model. It is not changed: the methods are called on copies of its blocks.
    run : callable
        Runs the model in eval mode. It is called only if a module has one of the `FOLD_METHODS`.

    Returns
    -------
    dict of str to FoldedBlock
        The blocks by their path. Where the fold of a block contains that of an inner one, the outer one only.

    Warns
    -----
    FxpruneWarning
        If the method of a module fails. Its branches then count as they are.

    Examples
    --------
    >>> find_folded_blocks(nn.Sequential(nn.ReLU()), lambda: None)
    {}
    """
    trials = {path: _Trial(path, module) for path, module in model.named_modules() if path and fold_method(module)}
    with ExitStack() as hooks, torch.no_grad():
        for trial in trials.values():
            hooks.callback(trial.module.register_forward_hook(trial.observe, with_kwargs=True).remove)
        if trials:
            run()
    found = {path: block for path, trial in trials.items() if (block := trial.result(trials)) is not None}
    parts = {path: block.unit.parts for path, block in found.items()}
    inner = {path for path in parts for outer in parts if path.startswith(f"{outer}.") and parts[path] & parts[outer]}
    return {path: block for path, block in found.items() if path not in inner}


def fold_method(module: nn.Module) -> str | None:
    """Return the name of the module's method that folds it and needs no arguments; None without one."""
    for name in FOLD_METHODS:
        method = getattr(module, name, None)
        if inspect.ismethod(method):
            given = inspect.signature(method).parameters.values()
            if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given):
                return name
    return None


class _Trial:
    """Tries to fold one module on the inputs of its calls.

    Attributes
    ----------
    folded : Module or None
        A folded copy of the module, from its first call on; None if it is not a block.
    """

    running = False
    """Whether a trial runs a module itself, so that hooks do not observe the call."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module, self.method = path, module, str(fold_method(module))
        self.folded: nn.Module | None = None
        self.called, self.flops, self.folded_flops = False, 0, 0

    def observe(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Compare a call of the module with one of its folded copy, and count the operations of both."""
        if _Trial.running:
            return
        _Trial.running = True
        try:
            if not self.called:
                self.called, self.folded = True, self._fold(lambda folded: folded(*args, **kwargs), output)
            if self.folded is not None:
                self.flops += count_flops(partial(module, *args, **kwargs), Graphs(module, ()))[0]
                self.folded_flops += count_flops(partial(self.folded, *args, **kwargs), Graphs(self.folded, ()))[0]
        finally:
            _Trial.running = False

    def _fold(self, call: Callable[[nn.Module], Any], expected: Any) -> nn.Module | None:
        """Fold a copy of the module. Returns None if its output is another one, or if its method fails."""
        try:
            twin = copy.deepcopy(self.module)
            returned = getattr(twin, self.method)()
        except Exception as error:  # a method of the model may raise any error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warn_user(
                f"{self.path}.{self.method}() failed ({type(error).__name__}: {reason[:200]}): its branches count as"
                " they are, and each may be removed alone"
            )
            return None
        folded = returned if isinstance(returned, nn.Module) else twin
        for forward in ("forward", "forward_fuse"):  # the caller of the method may have to set the second one
            if hasattr(folded, forward):
                folded.forward = getattr(folded, forward)
                if _gives(folded, call, expected):
                    return folded
        return None

    def result(self, trials: Mapping[str, _Trial]) -> FoldedBlock | None:
        """Return the block, or None if the module is none."""
        if self.folded is None:
            return None
        new = _weights(self.folded) - _weights(self.module)
        holds_blocks = any(path.startswith(f"{self.path}.") for path in trials)
        if not new or (len(new) > 1 and holds_blocks):
            return None
        before, after = (dict(module.named_parameters()) for module in (self.module, self.folded))
        parts = frozenset(join_path(self.path, name) for name in before.keys() - after.keys())
        params_saved = sum(value.numel() for value in before.values()) - sum(value.numel() for value in after.values())
        saves = self.flops > self.folded_flops
        unit = FoldedUnit(self.method, parts)
        return FoldedBlock(unit, self.flops - self.folded_flops, params_saved) if saves else FoldedBlock(unit, 0, 0)


def _gives(folded: nn.Module, call: Callable[[nn.Module], Any], expected: Any) -> bool:
    """Whether a folded module gives an output, within `TOLERANCE`."""
    try:
        outputs = tree_leaves(call(folded))
    except Exception:  # a module may need the forward for folded modules
        return False
    targets = tree_leaves(expected)
    return len(outputs) == len(targets) and all(
        isinstance(new, Tensor) and isinstance(old, Tensor) and new.shape == old.shape and _is_near(new, old)
        for new, old in zip(outputs, targets, strict=True)
    )


def _is_near(new: Tensor, old: Tensor) -> bool:
    difference, size = (float(torch.linalg.vector_norm(value.float())) for value in (new - old, old))
    return difference <= TOLERANCE * size + 1e-6


def _weights(module: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """Return path and shape of each parameter with at least two dimensions longer than 1: of layers, not of norms."""
    found = ((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    return {(name, shape) for name, shape in found if sum(size > 1 for size in shape) >= 2}


def fold_flops(
    flops: Mapping[NodeName, int], graphs: Graphs, blocks: Mapping[str, FoldedBlock]
) -> dict[NodeName, float]:
    """Scale the FLOPs of the nodes that read the branches of a block, so that they sum up to those after the fold."""
    owners = {part: path for path, block in blocks.items() if block.flops_saved for part in block.unit.parts}
    readers: dict[str, set[NodeName]] = {}
    for island, gm in graphs if owners else ():
        for node in gm.graph.nodes:
            for name, _ in node_parameters(gm, node):
                if (path := owners.get(join_path(island, name))) is not None:
                    readers.setdefault(path, set()).add((island, node.name))
    scaled: dict[NodeName, float] = dict(flops)
    for path, nodes in readers.items():
        before = sum(flops.get(node, 0) for node in nodes)
        for node in nodes if before else ():
            scaled[node] = flops.get(node, 0) * (1 - blocks[path].flops_saved / before)
    return scaled


def saved_by_folding(blocks: Mapping[str, FoldedBlock]) -> tuple[int, int]:
    """Return the FLOPs and the parameters that the fold of all blocks saves."""
    return sum(block.flops_saved for block in blocks.values()), sum(block.params_saved for block in blocks.values())
