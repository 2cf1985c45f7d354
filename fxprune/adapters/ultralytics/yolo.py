"""`YOLO` objects of ultralytics: the network inside, and a subclass that trains a pruned network on."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fxprune.adapters.ultralytics.pruned_yaml import is_pruned
from fxprune.adapters.ultralytics.trainer import RELOADING
from fxprune.adapters.ultralytics.trainer import trainer as keeping_trainer
from fxprune.errors import ModelError
from fxprune.graph.fx_utils import class_names
from fxprune.runtime.pickled_names import PickledName

_STALE = ("model", "ema", "optimizer", "scaler", "updates", "epoch", "best_fitness", "stopper", "modelopt")
"""Entries of a loaded checkpoint that belong to the network in it, and do not fit another one."""


def is_yolo(model: nn.Module) -> bool:
    """Whether the model is a `YOLO` object, or a similar one, that wraps a network."""
    return "ultralytics.engine.model.Model" in class_names(model)


def unwrap_yolo(model: nn.Module) -> nn.Module:
    """Return the network inside a `YOLO` object.

    Raises
    ------
    ModelError
        If the object holds an exported model and no network.
    """
    network = cast(Any, model).model
    if not isinstance(network, nn.Module):
        raise ModelError(f"this {type(model).__name__} holds {network!r}, not a PyTorch network; load the .pt or .yaml")
    return network


def rewrap_yolo(model: nn.Module, network: nn.Module) -> nn.Module:
    """Return a copy of a `YOLO` object with another network.

    The copy has no predictor, trainer and metrics, a list of callbacks of its own, and nothing of the checkpoint that
    belongs to the old network. If the network was pruned, then the copy keeps it when it is trained.
    """
    twin = cast(Any, copy.copy(model))
    twin.__dict__ = {key: copy.copy(value) for key, value in model.__dict__.items()}
    checkpoint = {key: value for key, value in (twin.ckpt or {}).items() if key not in _STALE}
    twin.__dict__.update(predictor=None, trainer=None, metrics=None, ckpt=checkpoint)
    for event, functions in twin.callbacks.items():
        twin.callbacks[event] = list(functions)
    twin.model = network
    keep_pruned(twin)
    return cast(nn.Module, twin)


def keep_pruned(model: nn.Module) -> None:
    """Make a `YOLO` object with a pruned network keep that network when it is trained. Others stay as they are."""
    if is_pruned(cast(Any, model).model) and not isinstance(model, _KeepsPruned):
        model.__class__ = _keeping(cast(Any, type(model)))


class _KeepsPruned:
    """Trains a pruned network on; mixed into the class of a `YOLO` object."""

    model: Any
    ckpt: Any
    task: str

    def train(self, trainer: Any = None, **kwargs: Any) -> Any:
        """Train the model, see `ultralytics.YOLO.train`; a pruned network stays pruned."""
        if is_pruned(self.model):
            trainer = keeping_trainer(trainer or cast(Any, self).task_map[self.task]["trainer"])
            self.ckpt = self.ckpt or {"model": self.model}  # without a checkpoint a network is built from the yaml
        return cast(Any, super()).train(trainer=trainer, **kwargs)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, see `ultralytics.YOLO.save`; without what only a training needs."""
        kept = vars(self.model).pop(RELOADING, None)
        try:
            return cast(Any, super()).save(*args, **kwargs)
        finally:
            if kept is not None:
                setattr(self.model, RELOADING, kept)

    def tune(self, *args: Any, **kwargs: Any) -> Any:
        """Tune the hyperparameters, see `ultralytics.YOLO.tune`; refused for a pruned network."""
        if is_pruned(self.model):
            raise ModelError(
                "tune() trains in other processes, which build the full network: tune the full network and pass the"
                " hyperparameters found to train() of the pruned one"
            )
        return cast(Any, super()).tune(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the class by that of the `YOLO` object."""
        return _blank, (type(self).__mro__[2],), cast(Any, self).__getstate__()


@functools.cache
def _keeping(kind: Any) -> Any:
    return type(kind.__name__, (_KeepsPruned, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


@PickledName
def _blank(kind: Any) -> Any:
    return nn.Module.__new__(_keeping(kind))


def _keep_if_yolo(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if name == "model" and is_pruned(submodule) and is_yolo(module) and not isinstance(module, _KeepsPruned):
        module.__class__ = _keeping(cast(Any, type(module)))


register_module_module_registration_hook(_keep_if_yolo)
"""A checkpoint is read before the `YOLO` object that will own the network is known. So the assignment is watched."""
