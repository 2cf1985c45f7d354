"""Saves a pruned model to a folder and loads it: plans and manifest as JSON, weights as safetensors.

Nothing is pickled, so a folder from someone else cannot run code when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.adapters.registry import unwrap
from fxprune.deploy.manifest import (
    NAME,
    WEIGHTS,
    Entry,
    Manifest,
    parse_json,
    plan_names,
    read_files,
    read_manifest,
    unknown_files,
)
from fxprune.deploy.weights import LOAD_HINT, WeightState, collect_state, load_state, read_weights
from fxprune.errors import ModelError, PlanError, SettingError, StorageError
from fxprune.planning.plan import Plan
from fxprune.planning.plan_schema import encode_json
from fxprune.rewriting.apply import apply
from fxprune.rewriting.history import attach_history, raw_plans, refuse_altered, structural_changes
from fxprune.runtime.atomic_write import atomic_write
from fxprune.runtime.json_text import first_few
from fxprune.version import __version__


def save(pruned: nn.Module, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Save a pruned model to a folder. `load` gives the same weights, with all bits equal.

    The folder contains ``plan.json`` (``plan-1.json``, ``plan-2.json``, ... if the model was pruned more than once),
    ``weights.safetensors`` (the `state_dict`) and ``manifest.json``. It is written under another name and renamed when
    it is complete. If an error occurs, no incomplete folder remains, and an earlier saved model stays as it was.

    Parameters
    ----------
    pruned : Module
        A model from `fxprune.compile`, `fxprune.apply` or `fxprune.heal`. It may have been trained after that, and may
        be on any device. It is not changed.
    folder : path
        The folder to write. Missing parent folders are created.
    overwrite : bool
        Whether to replace an earlier saved model. A folder with other files is not replaced.

    Raises
    ------
    ModelError
        If no plan was applied to the model.
    StorageError
        If the structure of the model was changed after pruning, for example by ultralytics' ``fuse()`` (``predict`` and
        ``val`` call it); if the weights cannot be written; if the folder is not empty or cannot be written.
    SettingError
        If `folder` is no path.

    Examples
    --------
    >>> fxprune.save(pruned, "pruned")                             # doctest: +SKIP
    >>> again = fxprune.load(build_model(), "pruned")              # doctest: +SKIP
    """
    network = unwrap(pruned)
    files = _plan_files(network)
    refuse_altered(network)
    target = _check_target(_resolve_path(folder), overwrite)
    state = collect_state(network)
    files[WEIGHTS] = state.to_bytes()
    files[NAME] = _make_manifest(network, state, files).to_bytes()
    with atomic_write(target) as draft:
        draft.mkdir()
        for name, content in files.items():
            (draft / name).write_bytes(content)


def load(model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Load a pruned model that `save` wrote.

    Parameters
    ----------
    model : Module
        The model as it was built before pruning, with any weights, or a `YOLO` object. It is not changed.
    folder : path
        The folder that `save` wrote.

    Returns
    -------
    Module
        The pruned model. Weights, dtype and the mode of each module (train or eval) are those of the saved model. The
        rest is that of `model`: device, `requires_grad`, shared weights, attributes such as class names, thresholds
        and image sizes, and buffers that are not in the `state_dict`.

    Raises
    ------
    StorageError
        If a file is missing, damaged, of another version or outside of the folder, or the weights do not fit the pruned
        model. The message names the file or the weights. All files are checked before the model is pruned.
    PlanError
        If a plan file is invalid, or the plan was made for a model of another structure.
    ModelError
        If `model` cannot be pruned, or was already pruned.
    SettingError
        If `folder` is no path.

    Examples
    --------
    >>> pruned = fxprune.load(retinanet_resnet50_fpn(num_classes=11, weights_backbone=None), "pruned")  # doctest: +SKIP
    """
    network = unwrap(model)
    if raw_plans(network):
        raise ModelError(f"this {type(network).__name__} was pruned already; {LOAD_HINT}")
    folder = _resolve_path(folder)
    manifest = read_manifest(folder)
    contents = read_files(folder, manifest)
    plans = {folder / name: _read_plan(folder / name, contents[name]) for name in manifest.plans}
    values = read_weights(folder / WEIGHTS, contents[WEIGHTS], manifest)
    for path, plan in plans.items():
        try:
            model = apply(model, plan)
        except PlanError as error:
            raise PlanError(f"{path}: {error}. It was saved from a {manifest.network}; {LOAD_HINT}") from error
    with torch.inference_mode(False), torch.no_grad():
        load_state(unwrap(model), values, manifest, folder / WEIGHTS)
        attach_history(unwrap(model), [plan.to_dict() for plan in plans.values()], structural_changes(unwrap(model)))
    for name, module in unwrap(model).named_modules():
        module.training = manifest.training != (name in manifest.exceptions)
    return model


# Writing -------------------------------------------------------------------------------------------------------------


def _resolve_path(folder: Any) -> Path:
    """Return the path of a folder with links followed: `overwrite` replaces the folder, not a link to it."""
    text = os.fspath(folder) if isinstance(folder, (str, PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise SettingError(f"folder is {folder!r}; give a path")
    return Path(os.path.realpath(text))


def _plan_files(network: nn.Module) -> dict[str, bytes]:
    plans = [Plan.from_dict(data).to_dict() for data in raw_plans(network)]
    if not plans:
        raise ModelError(
            f"no plan was applied to this {type(network).__name__}: prune it with fxprune.compile or fxprune.apply"
            " first. A model that was not pruned goes to torch.save or safetensors.torch.save_model"
        )
    return {name: encode_json(plan).encode() for name, plan in zip(plan_names(len(plans)), plans, strict=True)}


def _check_target(path: Path, overwrite: bool) -> Path:
    """Raise a `StorageError` unless a path is free, or is an earlier saved model that may be replaced."""
    try:
        if path == Path.cwd():
            raise StorageError(f"{path} is the current directory, which a save would replace; name a folder in it")
        if not path.exists():
            return path
        if not path.is_dir():
            raise StorageError(f"{path} is a file; give another place for the folder")
        if any(path.iterdir()) and not overwrite:
            raise StorageError(
                f"{path} is not empty; give another folder, or overwrite=True to replace an earlier save"
            )
        if strangers := unknown_files(path):
            raise StorageError(
                f"{path} holds {first_few(strangers)}, which is no save of fxprune's; give another folder"
            )
    except OSError as error:
        raise StorageError(f"{path} cannot be looked at ({error}); give another folder") from error
    return path


def _make_manifest(network: nn.Module, state: WeightState, files: Mapping[str, bytes]) -> Manifest:
    tensors = (*network.parameters(), *network.buffers())
    modes = {path: module.training for path, module in network.named_modules()}
    return Manifest(
        fxprune=__version__,
        torch=torch.__version__,
        network=type(network).__name__,
        dtype=tuple(sorted({str(value.dtype)[len("torch.") :] for value in tensors if value.is_floating_point()})),
        training=network.training,
        exceptions=tuple(path for path, training in modes.items() if training != network.training),
        channels_last=state.channels_last,
        tied=state.tied,
        files={name: Entry.of(content) for name, content in files.items()},
    )


# Reading -------------------------------------------------------------------------------------------------------------


def _read_plan(path: Path, content: bytes) -> Plan:
    try:
        return Plan.from_dict(parse_json(path, content))
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
