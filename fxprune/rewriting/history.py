"""Stores attributes on a pruned network: plans, inventory, savings of narrower layers, and its `save_pretrained`."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.adapters.registry import unwrap
from fxprune.capture.module_trace import Traced, trace_module
from fxprune.errors import ModelError, StorageError
from fxprune.graph.fx_utils import graph_structure, is_within
from fxprune.planning.plan import Plan
from fxprune.planning.pretrained_config import write_plans
from fxprune.runtime.json_text import first_few
from fxprune.runtime.torch_internals import BatchNormBase, keep_when_copied

PLANS_ATTRIBUTE = "fxprune_plans"
"""Attribute of a pruned network: the plans applied to it, oldest first, as plain data."""
LAYOUT_ATTRIBUTE = "fxprune_layout"
"""Attribute of a pruned network: its inventory after the last plan was applied, as plain data."""
SAVINGS_ATTRIBUTE = "fxprune_spared"
"""Attribute of a pruned network: the costs that narrower layers save in addition to its last plan."""


def raw_plans(network: nn.Module) -> list[dict[str, Any]]:
    """Return the plans applied to a network, oldest first, as plain data; empty if there are none."""
    return list(getattr(network, PLANS_ATTRIBUTE, ()))


def applied_plans(model: nn.Module) -> tuple[Plan, ...]:
    """Return the plans applied to a model, oldest first.

    Raises
    ------
    ModelError
        If no plan was applied.
    """
    plans = tuple(Plan.from_dict(data) for data in raw_plans(unwrap(model)))
    if not plans:
        raise ModelError(
            f"{type(model).__name__} carries no fxprune plan: it was not pruned, or rebuilt since; give the"
            " output of fxprune.analyze, Analysis.plan or fxprune.compile"
        )
    return plans


def traced_islands(network: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield the path and the graph of each part of a pruned network that its plans describe as one graph.

    Parts that are gone or are no graph any more are left out. A network that was not pruned has none.
    """
    plans = applied_plans(network) if raw_plans(network) else ()
    parts = dict(network.named_modules())
    for record in {record.name: record for plan in plans for record in plan.islands}.values():
        if record.name in parts:
            traced = trace_module(
                parts[record.name], frozenset(record.opaque), fixed_opaque=True, constants=record.constants
            )
            if isinstance(traced, Traced):
                yield record.name, traced.gm


def structural_changes(network: nn.Module) -> list[str]:
    """List changes of a pruned network's structure that its plans did not make; empty if it has no inventory."""
    layout = getattr(network, LAYOUT_ATTRIBUTE, None)
    return [] if layout is None else [*layout["altered"], *compare_inventory(layout["parts"], network)]


def refuse_altered(network: nn.Module) -> None:
    """Raise `StorageError` if a network was changed after pruning, so that its plans do not lead to its structure."""
    lines = structural_changes(network)
    if lines:
        raise StorageError(
            f"the structure of this {type(network).__name__} was changed after pruning, so its plans do not lead to"
            f" it: {first_few(lines)}. Save before such a change and repeat it after load (ultralytics' predict and val"
            " fuse the model they are called on; so does fuse), or make it before pruning"
        )


def attach_history(
    network: nn.Module, plans: list[dict[str, Any]], altered: list[str], saved: dict[str, Any] | None = None
) -> None:
    """Set the history attributes on a network. They are kept by `copy.deepcopy`, of a GraphModule too."""
    saved = getattr(network, SAVINGS_ATTRIBUTE, {}) if saved is None else saved
    notes = {
        PLANS_ATTRIBUTE: plans,
        LAYOUT_ATTRIBUTE: {"parts": take_inventory(network), "altered": altered},
        SAVINGS_ATTRIBUTE: saved,
    }
    for name, value in notes.items():
        setattr(network, name, value)
    if isinstance(network, fx.GraphModule):
        keep_when_copied(network, notes)


def note_in_last_plan(network: nn.Module, **entries: Any) -> None:
    """Set entries of the settings of a network's last plan, and remove those that are None."""
    *others, last = raw_plans(network)
    settings = {name: value for name, value in {**last["settings"], **entries}.items() if value is not None}
    attach_history(network, [*others, {**last, "settings": settings}], structural_changes(network))


_TENSOR = "a tensor"


def take_inventory(network: nn.Module) -> dict[str, str]:
    """Return the parts of a network: its modules by path and the shapes of its state by key, in words.

    A graph is described by a digest of its nodes. All batch norms are one kind: `SyncBatchNorm` computes the same.

    Examples
    --------
    >>> take_inventory(nn.Linear(2, 3))
    {'': 'a Linear', 'weight': 'a tensor (3, 2)', 'bias': 'a tensor (3,)'}
    """
    parts = {path: _describe_module(module) for path, module in network.named_modules(remove_duplicate=False)}
    for key, value in network.state_dict().items():
        parts[key] = f"{_TENSOR} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{_TENSOR} of no shape"
    return parts


def compare_inventory(before: Mapping[str, str], network: nn.Module) -> list[str]:
    """List the differences between an earlier inventory and a network, one per part; empty if there are none.

    Added or removed modules are listed by their tensors. Modules without tensors, such as a loss, are ignored.
    """
    now, lines = take_inventory(network), []
    for name in {**before, **now}:
        was, new = before.get(name), now.get(name)
        if was == new or (None in (was, new) and not str(was or new).startswith(_TENSOR)):
            continue
        lines.append(f"{name!r} is new" if was is None else f"{name!r} was {was} and is {new or 'gone'}")
    return lines


def _describe_module(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):
        return f"the graph {hashlib.sha256(repr(graph_structure(module.graph)).encode()).hexdigest()[:8]}"
    kind = BatchNormBase if isinstance(module, BatchNormBase) else type(module)
    return f"a {kind.__qualname__}"


def narrowing_savings(
    flops: Mapping[str, float], before: Mapping[str, Tensor], narrowed: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Compute the costs that narrower layers save.

    Parameters
    ----------
    flops : mapping of str to float
        Floating point operations per image of each layer before the removal, by path.
    before : mapping of str to Tensor
        Weights before the removal, by path.
    narrowed : mapping of str to tuple of int
        New shapes of the weights that became narrower, by path.

    Returns
    -------
    dict
        Savings under ``flops`` and ``params``.

    Examples
    --------
    >>> narrowing_savings({"conv": 200.0}, {"conv.weight": torch.ones(4, 5)}, {"conv.weight": (4, 3)})
    {'flops': 80.0, 'params': 8}
    """
    saved = {key: before[key].numel() - math.prod(shape) for key, shape in narrowed.items()}
    layers = {key: max((path for path in flops if is_within(key, path)), key=len, default="") for key in saved}
    shares = {key: saved[key] / before[key].numel() for key in saved}
    return {"flops": sum(flops.get(layers[key], 0.0) * shares[key] for key in saved), "params": sum(saved.values())}


SAVE = "save_pretrained"
"""Method by which models of Hugging Face libraries save themselves to a folder."""
_OWN_NAMES = "save_original_format"
"""Argument of it: whether weights are saved in the format of the first release, or by their names in the model."""


class SavePretrained:
    """`save_pretrained` of a pruned module, in place of that of its class. It stores the plans in the folder too.

    The folder of the class's own method has the configuration of the model before pruning. From it `from_pretrained`
    would build the whole model and fill what is missing with random weights. Where a folder cannot be made that
    prevents this, the call is refused.

    Parameters
    ----------
    module : Module
        The module.
    refusal : str
        Why the module cannot be saved in this way, or "".
    """

    def __init__(self, module: nn.Module, refusal: str = "") -> None:
        self.module, self.refusal = module, refusal

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the module; arguments as those of the class's own method."""
        if self.refusal:
            raise StorageError(self.refusal)
        method = getattr(type(self.module), SAVE)
        signature = inspect.signature(method)
        given = signature.bind(self.module, *args, **kwargs).arguments
        if given.get("push_to_hub"):
            raise StorageError(
                "push_to_hub=True would upload the folder before the plans are in it; call save_pretrained(folder)"
                " without it, and push_to_hub(repo_id) of the model"
            )
        if given.get("distributed_checkpoint"):
            raise StorageError("distributed_checkpoint=True writes a folder that holds no plans; leave it out")
        refuse_altered(self.module)
        if _OWN_NAMES in signature.parameters and _OWN_NAMES not in given:
            kwargs[_OWN_NAMES] = False  # the original format has weights that are made of several, and some may be gone
        result = method(self.module, *args, **kwargs)
        if given.get("is_main_process", True):
            write_plans(Path(given["save_directory"]), raw_plans(self.module), type(self.module).__name__)
        return result


def override_save_pretrained(original: nn.Module, pruned: nn.Module) -> None:
    """Set `SavePretrained` on every module that has `save_pretrained` and of which a part was removed.

    Parameters
    ----------
    original : Module
        The network before the removal.
    pruned : Module
        The network after it. Attributes are set on it.
    """
    owners = {path: module for path, module in pruned.named_modules() if hasattr(_original_class(module), SAVE)}
    if not owners:
        return
    before, after = take_inventory(original), take_inventory(pruned)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for path, module in owners.items():
        if any(is_within(name, path) for name in changed):
            setattr(module, SAVE, SavePretrained(module, _why_not_saved(type(pruned).__name__, path, module)))


def _why_not_saved(network: str, path: str, module: nn.Module) -> str:
    """Return why a module that has `save_pretrained` cannot be saved by it, in words, or ""."""
    kind, transformers = _original_class(module), sys.modules.get("transformers")
    if path:
        return (
            f"{path!r} is a part of a pruned {network}, and {SAVE} of this {kind.__name__} would save it without its"
            f" plan; save the whole model, or prune this {kind.__name__} by itself"
        )
    if transformers is None or not issubclass(kind, transformers.PreTrainedModel):
        return (
            f"from_pretrained of {kind.__name__} would build the whole model from a folder of {SAVE}, with random"
            " weights where blocks were removed; use fxprune.save and fxprune.load"
        )
    if kind is not type(module):
        return f"the forward of this {kind.__name__} itself became a graph, which {SAVE} cannot store; use fxprune.save"
    return ""


def _original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or of the module that a pruned module replaces."""
    kind: type[nn.Module] = getattr(module, "original_class", type(module))
    return kind
