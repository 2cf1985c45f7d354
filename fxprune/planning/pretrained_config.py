"""Stores plans in the ``config.json`` of a Hugging Face folder, and lets its own loader refuse the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxprune.errors import PlanError, StorageError
from fxprune.planning.plan import Plan
from fxprune.runtime.atomic_write import atomic_write

CONFIG_FILE = "config.json"
PLANS_KEY = "fxprune"
"""Key of ``config.json``: the plans that were applied, oldest first."""
WEIGHTS_KEY = "transformers_weights"
"""Key of ``config.json``: the file of the weights. The loader of transformers refuses a value that names no file."""
HINT = "this model was pruned: load it with fxprune.from_pretrained({network}, folder)"
"""The value under `WEIGHTS_KEY`, which the loader's error shows."""


def write_plans(folder: Path, plans: Sequence[Mapping[str, Any]], network: str) -> None:
    """Add plans to the ``config.json`` of a folder that `save_pretrained` wrote.

    Parameters
    ----------
    folder : Path
        The folder.
    plans : sequence of mapping
        The plans as plain data, oldest first.
    network : str
        Class name of the network, for the message of the loader that refuses the folder.

    Raises
    ------
    StorageError
        If there is no ``config.json``, or it cannot be read or written.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path} cannot be read ({error}), so the plans cannot be stored in it; use fxprune.save"
        ) from error
    head = json.dumps({**config, WEIGHTS_KEY: HINT.format(network=network)}, indent=2, sort_keys=True)
    text = f'{head[:-2]},\n  "{PLANS_KEY}": {json.dumps(list(plans))}\n}}\n'
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_plans(config: Mapping[str, Any], where: object) -> tuple[Plan, ...]:
    """Return the plans of a configuration, oldest first.

    Parameters
    ----------
    config : mapping
        The content of ``config.json``.
    where
        The folder, for messages.

    Raises
    ------
    StorageError
        If there are no plans.
    PlanError
        If a plan is invalid. The message names the field.

    Examples
    --------
    >>> read_plans({"model_type": "detr"}, "folder")
    Traceback (most recent call last):
    fxprune.errors.StorageError: folder: its config.json has no plan ...
    """
    rows = config.get(PLANS_KEY)
    if not isinstance(rows, list) or not rows:
        raise StorageError(
            f"{where}: its {CONFIG_FILE} has no plan (no list under {PLANS_KEY!r}). A model that was not pruned is"
            " loaded by the from_pretrained of its class; a folder of fxprune.save by fxprune.load"
        )
    try:
        return tuple(map(Plan.from_dict, rows))
    except PlanError as error:
        raise PlanError(f"{where}, {CONFIG_FILE}: {error}") from None
