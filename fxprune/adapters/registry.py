"""The table of adapters, and what is done about wrappers around a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxprune.adapters import classifier, custom_loss, torchvision, ultralytics
from fxprune.adapters.protocol import Adapter, refuse_detection
from fxprune.errors import ModelError, SettingError
from fxprune.graph.fx_utils import class_names

ADAPTERS: tuple[Adapter, ...] = (ultralytics.ADAPTER, torchvision.ADAPTER, classifier.ADAPTER)
"""Tried in this order; the last one takes whatever gives logits."""

_WRAPPERS: dict[str, str] = {
    "torch._dynamo.eval_frame.OptimizedModule": "pass model._orig_mod and compile the result again",
    "torch.nn.parallel.data_parallel.DataParallel": "pass model.module and wrap the result again",
    "torch.nn.parallel.distributed.DistributedDataParallel": "pass model.module and wrap the result again",
    "torch.jit._script.ScriptModule": "pass the eager model; TorchScript has no Python to trace",
}


def choose_adapter(model: nn.Module, raw: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Adapter:
    """Pick the adapter for a model, given its first batch and the caller's loss."""
    if loss is not None:
        if not callable(loss):
            raise SettingError(f"loss must be callable(model, batch) -> scalar tensor, got {type(loss).__name__}")
        return custom_loss.make_adapter(loss)
    return next(adapter for adapter in ADAPTERS if adapter.matches(model, raw))


def detector_adapter(network: nn.Module) -> Adapter:
    """Pick the adapter for a detector, without a batch of it: ultralytics', or else torchvision's convention.

    Raises
    ------
    ModelError
        If the model is known to be no detector: one of torchvision's classifiers and the like.
    """
    known = any(name.startswith("torchvision.models.") for name in class_names(network))
    if known and not torchvision.is_torchvision_detector(network):
        refuse_detection(network)
    return next(adapter for adapter in ADAPTERS if adapter.matches(network, ([], [])))


def unwrap(model: Any) -> nn.Module:
    """Return the network to work on: the model itself, or what a `YOLO` object holds.

    Raises
    ------
    ModelError
        If it is no module, is wrapped (says how to unwrap), or its weights are on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name in class_names(model):
        if name in _WRAPPERS:
            raise ModelError(f"the model is wrapped in {type(model).__name__}: {_WRAPPERS[name]}")
    network = ultralytics.unwrap_yolo(model) if ultralytics.is_yolo(model) else model
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise ModelError("the model's weights are on the meta device; load them first")
    return network


def rewrap_like(model: nn.Module, network: nn.Module) -> nn.Module:
    """Give a pruned network the wrapper its original had: a `YOLO` comes back as a `YOLO`."""
    return ultralytics.rewrap_yolo(model, network) if ultralytics.is_yolo(model) else network
