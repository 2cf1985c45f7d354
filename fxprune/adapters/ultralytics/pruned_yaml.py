"""Marks the yaml of a pruned network. ultralytics builds networks from it, and cannot build a pruned one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from fxprune.graph.fx_utils import class_names

NOTE = (
    "this network was pruned by fxprune, and its yaml describes the full one: import fxprune before you load it, or"
    " pass trainer=fxprune.trainer(DetectionTrainer), with the trainer of the task"
)
"""Stands as the first layer in the yaml. Whatever builds a network from the yaml fails with this text."""
UNPRUNED = "unpruned"
"""Key of the full network's yaml in the yaml of a pruned network."""


def is_ultralytics(network: object) -> bool:
    """Whether an object is a network of ultralytics."""
    return isinstance(network, nn.Module) and "ultralytics.nn.tasks.BaseModel" in class_names(network)


def is_marked(yaml: object) -> bool:
    """Whether a yaml, as a dictionary, is that of a pruned network.

    Examples
    --------
    >>> is_marked({"backbone": [], "head": []})
    False
    """
    return isinstance(yaml, Mapping) and UNPRUNED in yaml


def is_pruned(network: object) -> bool:
    """Whether a network of ultralytics was pruned."""
    return isinstance(network, nn.Module) and is_marked(getattr(network, "yaml", None))


def mark_pruned(network: nn.Module) -> None:
    """Mark the yaml of a network of ultralytics, and name its file, so that exports do not overwrite those of others.

    The yaml and the name are plain data: a checkpoint with them can be read without this package.
    """
    if not is_ultralytics(network):
        return
    module = cast(Any, network)
    yaml = getattr(module, "yaml", None)
    if isinstance(yaml, Mapping):
        module.yaml = marked(yaml)
    known = getattr(module, "pt_path", None) or (yaml or {}).get("yaml_file") or "model.pt"
    module.pt_path = str(_rename(Path(known)).with_suffix(".pt"))


def marked(yaml: Mapping[str, Any]) -> dict[str, Any]:
    """Return the yaml of a pruned network; `yaml` is that of the full network, or of one that is pruned already."""
    full = copy.deepcopy(dict(unmarked(yaml)))
    first = [-1, 1, NOTE, []]
    file = {"yaml_file": str(_rename(Path(full["yaml_file"])))} if full.get("yaml_file") else {}
    return {**full, **file, "backbone": [first, *full.get("backbone", ())], UNPRUNED: full}


def unmarked(yaml: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the yaml of the full network.

    Examples
    --------
    >>> unmarked(marked({"nc": 3, "backbone": []}))
    {'nc': 3, 'backbone': []}
    """
    return cast("Mapping[str, Any]", yaml[UNPRUNED]) if is_marked(yaml) else yaml


def _rename(path: Path) -> Path:
    """Add the word pruned to the name of a file, or count up: ``best_pruned``, ``best_pruned2``."""
    found = re.fullmatch(r"(.*_pruned)(\d*)", path.stem)
    return path.with_stem(f"{found[1]}{int(found[2] or 1) + 1}" if found else "_".join((path.stem, "pruned")))
