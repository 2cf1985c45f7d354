"""Fits a pruned network to the classes of a data set: the last layers of the head get one row per class."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.adapters.ultralytics.pruned_yaml import marked, unmarked
from fxprune.errors import ModelError

PROBE = 1001
"""Number of classes at which the widths of hidden layers no longer depend on it: ultralytics caps them at 100."""
_ROWS = {nn.Conv2d: "out_channels", nn.Linear: "out_features", nn.Embedding: "num_embeddings"}


def fit_classes(network: nn.Module, full: nn.Module, *, by_name: bool) -> nn.Module:
    """Return a copy of a pruned network with the classes of a full network.

    Parameters
    ----------
    network : Module
        A pruned network of ultralytics; not changed.
    full : Module
        The full network with the wanted classes and other settings, as a trainer builds it; its weights are random.
    by_name : bool
        Whether a class whose name both networks know keeps its weights, wherever it stands.

    Returns
    -------
    Module
        All layers except those that have a row per class keep their weights.

    Raises
    ------
    ModelError
        If the networks differ in more than the classes, or if a layer with a row per class was removed.
    """
    pruned, wanted = cast(Any, network), cast(Any, full)
    _check_settings(unmarked(pruned.yaml), wanted.yaml)
    before = build_full(network, _count(pruned.yaml))
    new: Any = copy.deepcopy(network)
    rows = _matching_rows(getattr(pruned, "names", None), getattr(wanted, "names", None)) if by_name else None
    other = _count(wanted.yaml) != _count(pruned.yaml)
    if other or (rows is not None and not torch.equal(rows, torch.arange(len(rows)))):
        for path in class_layers(network):
            _set_rows(new, path, before.get_submodule(path), full.get_submodule(path), rows, other)
    _copy_changed_settings(before, full, new)
    if hasattr(wanted, "names"):
        new.names = wanted.names
    new.yaml, new.criterion = marked(wanted.yaml), None
    return cast(nn.Module, new)


def build_full(network: nn.Module, classes: int) -> nn.Module:
    """Build the full network that a pruned network comes from, with random weights, for a number of classes."""
    yaml = copy.deepcopy(dict(unmarked(cast(Any, network).yaml)))
    kind = cast(Any, type(network))
    with torch.random.fork_rng(devices=[]):
        return cast(nn.Module, kind(yaml, ch=yaml.get("channels", 3), nc=classes, verbose=False))


def class_layers(network: nn.Module) -> list[str]:
    """Return the paths of the layers that have a row per class.

    They are the layers that grow by one row with one class more.
    """
    less, more = (dict(build_full(network, PROBE + extra).named_modules()) for extra in (0, 1))
    return [
        path
        for path, layer in less.items()
        if type(layer) in _ROWS and len(cast(Any, more[path]).weight) - len(cast(Any, layer).weight) == 1
    ]


def _count(yaml: Mapping[str, Any]) -> int:
    return int(yaml["nc"])


def _check_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    old = {"channels": 3, **old}
    names = [key for key in old if key != "nc" and key in new and old[key] != new[key]]
    if names:
        found = ", ".join(f"{key}={new[key]!r} in place of {old[key]!r}" for key in names)
        raise ModelError(
            f"the data ask for {found}, and a pruned network can only change its classes: train the full network on"
            " these data, and prune it afterwards"
        )


def _matching_rows(old: Any, new: Any) -> Tensor | None:
    """Return for each new class the number of the old class of this name, or -1; None if no name is known to both."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return None
    if any(all(str(key) == str(name) for key, name in names.items()) for names in (old, new)):
        return None  # placeholders, which name nothing
    numbers = {str(name).strip().lower(): key for key, name in old.items()}
    rows = torch.tensor([numbers.get(str(new[key]).strip().lower(), -1) for key in sorted(new)])
    return rows if bool((rows >= 0).any()) else None


def _set_rows(
    network: nn.Module, path: str, before: nn.Module, full: nn.Module, rows: Tensor | None, other: bool
) -> None:
    """Give a layer the rows of the new classes: those of `full`, or of the same layer where a name is known."""
    try:
        old: Any = network.get_submodule(path)
    except AttributeError:
        old = None
    if type(old) is nn.Identity:
        old = before
    if type(old) not in _ROWS:
        raise ModelError(
            f"{path} has a row per class and was removed, so that this network cannot change its classes: train the"
            " full network on these data, and prune it afterwards"
        )
    fresh, new = cast(Any, full), copy.deepcopy(old)
    count = len(fresh.weight)
    setattr(new, _ROWS[type(new)], count)
    new.weight = nn.Parameter(old.weight.new_empty(count, *old.weight.shape[1:]))
    new.reset_parameters()
    with torch.no_grad():
        if fresh.weight.shape == new.weight.shape and other:
            new.weight.copy_(fresh.weight)
        if getattr(old, "bias", None) is not None:
            new.bias = nn.Parameter(fresh.bias.to(old.bias))
        if rows is not None and count == len(rows):
            known = rows >= 0
            for name in ("weight", "bias"):
                if getattr(old, name, None) is not None:
                    getattr(new, name)[known] = getattr(old, name)[rows[known]]
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, new)


def _copy_changed_settings(before: nn.Module, full: nn.Module, new: nn.Module) -> None:
    """Copy the numbers by which `full` differs from `before`, such as a head's number of classes, to `new`."""
    old, parts = dict(before.named_modules()), dict(new.named_modules())
    for path, key, value in _plain_numbers(full):
        part = parts.get(path)
        if path not in old or part is None or type(part) in _ROWS:
            continue
        if key in vars(part) and vars(old[path]).get(key) != value:
            setattr(part, key, value)


def _plain_numbers(network: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for path, module in network.named_modules():
        yield from ((path, key, value) for key, value in vars(module).items() if isinstance(value, (int, float)))
