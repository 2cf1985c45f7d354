"""Defines `trainer`: a trainer of ultralytics that trains a pruned network on, in place of a new full network."""

from __future__ import annotations

import functools
import importlib
import operator
from typing import Any, cast

from torch import nn

from fxprune.adapters.ultralytics.class_layers import fit_classes
from fxprune.adapters.ultralytics.pruned_yaml import is_marked, is_pruned, unmarked
from fxprune.errors import ModelError, SettingError
from fxprune.runtime.pickled_names import OptionalName

_METHOD = "get_model"
RELOADING = "fxprune_reloading"
"""Attribute of a network in training. Reading it from a checkpoint imports this package, so that training can go on."""
IMPORT_IF_INSTALLED = OptionalName(__name__, "IMPORT_IF_INSTALLED")


def trainer(base: type) -> type:
    """Return a trainer that keeps what was removed from a pruned network.

    ultralytics trains a new network, which `get_model` of the trainer builds from the yaml. The full network would grow
    back. The returned class overrides `get_model`. Networks that were not pruned are trained as `base` trains them. The
    `YOLO` object that `fxprune.compile` and `fxprune.apply` return uses it by itself.

    Parameters
    ----------
    base : type
        A trainer of ultralytics, such as `DetectionTrainer`, or a subclass of one. If that subclass has a `get_model`
        of its own, then its `super().get_model` returns the pruned network.

    Returns
    -------
    type
        A subclass of `base`. It can be pickled by name, as training on several devices needs.

    Raises
    ------
    SettingError
        If `base` is no trainer of ultralytics.

    Notes
    -----
    `get_model` of the trainer raises `ModelError` if the network cannot be kept: its convolutions were fused, its
    weights are not asked for (``pretrained=False``), or the data ask for more than other classes.

    Examples
    --------
    >>> from ultralytics import YOLO                                    # doctest: +SKIP
    >>> from ultralytics.models.yolo.detect import DetectionTrainer     # doctest: +SKIP
    >>> YOLO("pruned.pt").train(trainer=fxprune.trainer(DetectionTrainer), data="coco8.yaml")   # doctest: +SKIP
    """
    owner = _owner_of_get_model(base)
    return base if getattr(base, _KEEPS, None) is True else _subclass(base, owner)


_KEEPS = "fxprune_keeps_pruned"


def _owner_of_get_model(base: Any) -> type:
    """Return the class of ultralytics, among a trainer's ancestors, that defines `get_model`."""
    ancestors = getattr(base, "__mro__", ())
    if not any(kind.__module__ == "ultralytics.engine.trainer" for kind in ancestors):
        raise SettingError(f"expected a trainer of ultralytics, such as DetectionTrainer, got {base!r}")
    owners = [kind for kind in ancestors if _METHOD in vars(kind) and kind.__module__.startswith("ultralytics.")]
    return cast(type, owners[0])


@functools.cache
def _subclass(base: Any, owner: Any) -> type:
    class Keeping(owner):  # type: ignore[misc]
        fxprune_keeps_pruned = True

        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            """Return a copy of the pruned network, with the classes of the data."""
            build = super().get_model
            if not is_pruned(weights) and not is_marked(cfg):
                return build(cfg=cfg, weights=weights, verbose=verbose)
            _check_weights(weights)
            full = build(cfg=dict(unmarked(weights.yaml)), weights=None, verbose=False)
            by_name = bool(getattr(self.args, "cls_remap", True))
            network = fit_classes(weights, full, by_name=by_name).requires_grad_(True)
            setattr(network, RELOADING, IMPORT_IF_INSTALLED)
            return network

    kind = Keeping if base is owner else type(f"Pruned{base.__name__}", (base, Keeping), {})
    kind.__name__, kind.__doc__ = f"Pruned{base.__name__}", f"`{base.__name__}` that keeps a pruned network."
    kind.__module__, kind.__qualname__ = _pickled_name(base)
    return kind


def _check_weights(weights: Any) -> None:
    if not isinstance(weights, nn.Module):
        raise ModelError(
            "a pruned network is trained on from its weights: leave pretrained=False and reset_weights() out"
        )
    if not is_pruned(weights):
        raise ModelError(
            f"pretrained={getattr(weights, 'pt_path', 'a model')!r} was not pruned, and does not fit the pruned"
            " network: leave pretrained out"
        )
    if cast(Any, weights).is_fused():
        raise ModelError(
            "this pruned network was fused, and has no norms left to train: load the .pt from before fuse()"
        )


def _pickled_name(base: type) -> tuple[str, str]:
    """Return the module and the name under which the subclass of a trainer is found, see `__getattr__`.

    A class of a script goes with the script's module: only there it is known.
    """
    if base.__module__ == "__main__":
        return base.__module__, f"Pruned{base.__qualname__}"
    return __name__, f"{base.__qualname__}@{base.__module__}".replace(".", "/")


def __getattr__(name: str) -> Any:
    """Find the subclass of a trainer by its pickled name."""
    path, at, module = name.partition("@")
    if not at:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module(module.replace("/", "."))
    return trainer(operator.attrgetter(path.replace("/", "."))(found))
