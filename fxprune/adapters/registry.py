"""Chooses the adapter of a model, and unwraps and rewraps wrapped models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters import classifier, custom_loss, torchvision
from fxprune.adapters.protocol import Adapter, refuse_detection
from fxprune.adapters.ultralytics import adapter as ultralytics
from fxprune.adapters.ultralytics import pruned_yaml, yolo
from fxprune.errors import ModelError, SettingError
from fxprune.graph.fx_utils import class_names
from fxprune.runtime.torch_internals import OptimizedModule

ADAPTERS: tuple[Adapter, ...] = (ultralytics.ADAPTER, torchvision.ADAPTER, classifier.ADAPTER)
"""Tried in this order. The last one matches every model and needs logits as output."""

_WRAPPERS: dict[type[nn.Module], str] = {
    OptimizedModule: "pass model._orig_mod and compile the result again",
    nn.DataParallel: "pass model.module and wrap the result again",
    nn.parallel.DistributedDataParallel: "pass model.module and wrap the result again",
    torch.jit.ScriptModule: "pass the eager model; TorchScript has no Python to trace",
}


def choose_adapter(model: nn.Module, raw: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Adapter:
    """Choose the adapter for a model by its first batch, or make one from the caller's loss.

    Parameters
    ----------
    model : Module
        The network, not wrapped.
    raw
        The first batch of the loader.
    loss : callable, optional
        ``loss(model, batch) -> scalar tensor``.

    Raises
    ------
    SettingError
        If `loss` is not callable.

    Examples
    --------
    >>> choose_adapter(nn.Linear(3, 2), None, None).family
    'classifier'
    """
    if loss is not None:
        if not callable(loss):
            raise SettingError(f"loss must be callable(model, batch) -> scalar tensor, got {type(loss).__name__}")
        return custom_loss.make_adapter(loss)
    return next(adapter for adapter in ADAPTERS if adapter.matches(model, raw))


def detector_adapter(network: nn.Module) -> Adapter:
    """Choose the adapter for a detector without a batch: ultralytics, or else torchvision's convention.

    Raises
    ------
    ModelError
        If the model is a torchvision model, but no detector.
    """
    known = any(name.startswith("torchvision.models.") for name in class_names(network))
    if known and not torchvision.is_torchvision_detector(network):
        refuse_detection(network)
    return next(adapter for adapter in ADAPTERS if adapter.matches(network, ([], [])))


def unwrap(model: Any) -> nn.Module:
    """Return the network inside a `YOLO` object, or the model itself.

    Raises
    ------
    ModelError
        If it is no module, is wrapped (the message says how to unwrap it), or has weights on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for kind, advice in _WRAPPERS.items():
        if isinstance(model, kind):
            raise ModelError(f"the model is wrapped in {type(model).__name__}: {advice}")
    network = yolo.unwrap_yolo(model) if yolo.is_yolo(model) else model
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise ModelError("the model's weights are on the meta device; load them first")
    return network


def mark_pruned(network: nn.Module) -> None:
    """Tell the library that a network comes from that it was pruned, if that library builds it anew to train it."""
    pruned_yaml.mark_pruned(network)


def rewrap_like(model: nn.Module, network: nn.Module) -> nn.Module:
    """Wrap a pruned network like its original model: returns a `YOLO` object if the original is one."""
    return yolo.rewrap_yolo(model, network) if yolo.is_yolo(model) else network
