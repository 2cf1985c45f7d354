"""A pruned model in a folder and back: its plans, its weights and a manifest; JSON and safetensors, never a pickle."""

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
from fxprune.rewriting.history import attach_history, raw_plans, structural_changes
from fxprune.runtime.atomic_write import atomic_write
from fxprune.runtime.json_text import first_few
from fxprune.version import __version__


def save(pruned: nn.Module, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write a pruned model to a folder, from which `load` brings it back bit for bit.

    The folder holds ``plan.json`` (``plan-1.json``, ``plan-2.json``, ... if it was pruned more than once),
    ``weights.safetensors`` (its `state_dict`) and ``manifest.json``. No pickle. It is written beside its place and
    moved there when complete: whatever goes wrong, there is no half-written folder, and an earlier save is still there.

    Parameters
    ----------
    pruned : Module
        What `fxprune.compile` or `fxprune.apply` returned, trained since or not, of any dtype, on any device.
        It is not changed.
    folder : path
        Where to; folders above it are made.
    overwrite : bool
        Whether to replace an earlier save. A folder that holds anything else is never touched.

    Raises
    ------
    ModelError
        If no plan was applied to the model.
    StorageError
        If its structure was changed since, such as by ultralytics' ``fuse()`` (which ``predict`` and ``val`` call);
        if its weights cannot be held; if the folder is not empty or cannot be written.
    SettingError
        If `folder` is no path.

    Examples
    --------
    >>> fxprune.save(pruned, "pruned")                             # doctest: +SKIP
    >>> again = fxprune.load(build_model(), "pruned")              # doctest: +SKIP
    """
    network = unwrap(pruned)
    files = _plan_files(network)
    _refuse_altered(network)
    target = _check_target(_resolve_path(folder), overwrite)
    state = collect_state(network)
    files[WEIGHTS] = state.to_bytes()
    files[NAME] = _make_manifest(network, state, files).to_bytes()
    with atomic_write(target) as draft:
        draft.mkdir()
        for name, content in files.items():
            (draft / name).write_bytes(content)


def load(model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Bring back a pruned model that `save` wrote.

    Parameters
    ----------
    model : Module
        The model as it was built before pruning, with any weights; or a `YOLO` object. It is not changed.
    folder : path
        What `save` was given.

    Returns
    -------
    Module
        The pruned model: outputs, dtype and mode (train or eval, module by module) as when it was saved; device,
        `requires_grad`, ties between weights and plain attributes (class names, thresholds, image sizes) as in
        `model`. What is in no `state_dict`, such as non-persistent buffers, is `model`'s too.

    Raises
    ------
    StorageError
        If a file is missing, damaged, of another version or leads out of the folder, or if the weights do not fit the
        pruned model; names the file or the weights. Every file is checked before anything is built.
    PlanError
        If a plan file is broken, or was made for another structure than `model`'s.
    ModelError
        If `model` cannot be pruned, or was pruned already.
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
    """Follow links, so that what is replaced is the folder and not the link to it."""
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


def _refuse_altered(network: nn.Module) -> None:
    lines = structural_changes(network)
    if lines:
        raise StorageError(
            f"the structure of this {type(network).__name__} was changed after pruning, so its plans do not lead to"
            f" it: {first_few(lines)}. Save before such a change and repeat it after load (ultralytics' predict and val"
            " fuse the model they are called on; so does fuse), or make it before pruning"
        )


def _check_target(path: Path, overwrite: bool) -> Path:
    """Refuse a place that is taken by anything but an earlier save that may go."""
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
