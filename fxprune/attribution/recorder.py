"""Records gradients and activations of all nodes and regions by an fx interpreter; criteria read the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import LossError
from fxprune.graph.fx_utils import full_precision, is_weighted, map_tensors
from fxprune.graph.interpreters import NodeName
from fxprune.graph.records import Region


@dataclass
class AttributionRecord:
    """Expectations, over the images so far, of products of gradients and activations.

    Attributes
    ----------
    grad_act : dict
        Per node, ``E_x [sum_i |dL/dA_i * A_i|]``: the score of arXiv 2602.14040. The expectation is over the images.
    grad_delta : dict
        Per region, ``E_x [sum_i |dL/dy_i * (y_i - s_i)|]``; y is the exit value and s the value of its stand-in.
    fisher : dict
        Per region, ``E_x [sum_c (sum_{i in c} dL/dy_i * (y_i - s_i))^2]``; c are the channels (second dimension) of
        every row of every call. This is the Fisher information of gates ``a_c`` in ``s_c + a_c (y_c - s_c)``.
    shapes : dict
        Per node, the shape of its value at the first call. Values that are not a single tensor have no entry.
    images : int
        Number of images so far.
    own_targets : frozenset of bool
        Whether the targets were the model's own outputs; both values if batches differed.
    """

    grad_act: dict[NodeName, float] = field(default_factory=dict)
    grad_delta: dict[str, float] = field(default_factory=dict)
    fisher: dict[str, float] = field(default_factory=dict)
    shapes: dict[NodeName, tuple[int, ...]] = field(default_factory=dict)
    images: int = 0
    own_targets: frozenset[bool] = frozenset()
    _pending: dict[tuple[str, Any], list[Tensor]] = field(default_factory=dict)
    _room: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle, without pending terms and without the buffer for products."""
        return {**vars(self), "_pending": {}, "_room": None}

    def add(self, kind: str, key: NodeName | str, value: Tensor) -> None:
        """Add one term of the current batch: ``grad_act`` of a node, ``grad_delta`` or ``fisher`` of a region.

        The value stays on its device until `close_batch`.
        """
        self._pending.setdefault((kind, key), []).append(value)

    def scratch(self, like: Tensor) -> Tensor:
        """Return a buffer for a product. It is reused: allocating large tensors takes longer than the sum itself."""
        if self._room is None or self._room.numel() < like.numel() or self._room.dtype != like.dtype:
            self._room = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return self._room[: like.numel()].view(like.shape)

    def close_batch(self, index: int, images: int, own_targets: bool = False) -> None:
        """Add the terms of the current batch to the expectations.

        The loss is the mean of the losses of single images. So the terms sum to a mean over the images already, and
        the squared terms to a mean divided by the number of images. Batches are weighted by their number of images.

        Parameters
        ----------
        index : int
            Number of the batch, for messages.
        images : int
            Number of images of the batch.
        own_targets : bool
            Whether the targets were the model's own outputs.

        Raises
        ------
        LossError
            If a gradient contains NaN or infinity. The message names the batch and the node; no term is added.
        """
        pending, self._pending = self._pending, {}
        sums = [torch.stack(terms).double().sum() for terms in pending.values()]
        means = dict(zip(pending, torch.stack(sums).tolist() if sums else [], strict=True))
        for (_, key), value in means.items():
            if not math.isfinite(value):
                where = key if isinstance(key, str) else ".".join(filter(None, key))
                raise LossError(f"batch {index}: the gradient at {where!r} is NaN or infinite; leave that batch out")
        weight = images / (self.images + images)
        known: dict[str, dict[Any, float]] = {
            "grad_act": self.grad_act,
            "grad_delta": self.grad_delta,
            "fisher": self.fisher,
        }
        for running in known.values():
            for key in running:
                running[key] *= 1 - weight
        for (kind, key), value in means.items():
            factor = weight * images if kind == "fisher" else weight
            known[kind][key] = known[kind].get(key, 0.0) + factor * value
        self.images += images
        self.own_targets |= {own_targets}


def merge_records(records: Sequence[AttributionRecord]) -> AttributionRecord:
    """Join records of different batches of one model; expectations are weighted by their numbers of images."""
    images = sum(record.images for record in records)

    def merge(kind: Callable[[AttributionRecord], dict[Any, float]]) -> dict[Any, float]:
        sums: dict[Any, float] = {}
        for record in records:
            for key, value in kind(record).items():
                sums[key] = sums.get(key, 0.0) + value * (record.images / images)
        return sums

    return AttributionRecord(
        merge(lambda record: record.grad_act),
        merge(lambda record: record.grad_delta),
        merge(lambda record: record.fisher),
        {key: shape for record in reversed(records) for key, shape in record.shapes.items()},
        images,
        frozenset().union(*(record.own_targets for record in records)),
    )


class StandInInterpreter(fx.Interpreter):
    """Runs a graph and keeps the values of the stand-ins of its regions until the run ends.

    Parameters
    ----------
    gm : GraphModule
        The graph.
    regions : iterable of Region
        Regions of the graph whose stand-ins are kept.
    """

    def __init__(self, gm: fx.GraphModule, regions: Iterable[Region]) -> None:
        super().__init__(gm)
        self.regions_by_exit: dict[str, list[Region]] = {}
        for region in regions:
            self.regions_by_exit.setdefault(region.exit, []).append(region)
        self.stand_in_names = {region.stand_in for found in self.regions_by_exit.values() for region in found}
        self.stand_ins: dict[str, Tensor] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, then release the kept values: hooks on them would keep them in memory."""
        try:
            return super().run(*args, **kwargs)
        finally:
            self.stand_ins.clear()


class RecordingInterpreter(StandInInterpreter):
    """Runs a graph with a hook on every value. The hook reduces the value and its gradient to a few scalars.

    Parameters
    ----------
    gm : GraphModule
        The graph.
    island : str
        Path of the island in the model.
    record : AttributionRecord
        The record that the scalars are added to.
    regions : iterable of Region
        Regions of the island.
    gate : float
        The exit of every region becomes ``s + gate (y - s)``, where s is the value of the stand-in. With 1 the graph
        is not changed.
    maps : mapping of str to callable
        By region, a function that is applied to the value of the stand-in to obtain s. Without an entry, s is that
        value.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        island: str,
        record: AttributionRecord,
        regions: Iterable[Region],
        gate: float = 1.0,
        maps: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    ) -> None:
        super().__init__(gm, regions)
        self.island, self.record, self.gate, self.maps = island, record, gate, maps
        self.weighted = {node.name for node in gm.graph.nodes if is_weighted(gm, node)}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and hook its value."""
        value = super().run_node(n)
        if n.op == "output":
            return map_tensors(value, torch.clone)  # the reader of the output may overwrite it in place
        if n.op == "placeholder":
            value = map_tensors(value, torch.clone)  # so may, later, the code that gave the input
        if n.name in self.weighted:
            value = map_tensors(value, _require_grad)
        if not isinstance(value, Tensor) or n.op == "get_attr":
            return value
        self.record.shapes.setdefault((self.island, n.name), tuple(value.shape))
        if value.requires_grad:
            value = self._attach_hook(n.name, value)
        if n.name in self.stand_in_names:
            self.stand_ins[n.name] = value
        return value

    def _attach_hook(self, name: str, value: Tensor) -> Tensor:
        """Return the value with a hook on it; if it is the exit of a region, gated first."""
        record, key = self.record, (self.island, name)
        regions, activation = self.regions_by_exit.get(name, ()), value.detach()
        stand_ins = {region.name: self._stand_in(region) for region in regions}
        differences = [(region.name, stand_ins[region.name].detach()) for region in regions]
        if regions and self.gate != 1.0:
            largest = max(regions, key=lambda region: len(region.nodes))
            value = torch.lerp(stand_ins[largest.name].to(value.dtype), value, self.gate)

        def hook(gradient: Tensor) -> None:
            gradient = full_precision(gradient)
            scratch = record.scratch(gradient)
            record.add("grad_act", key, torch.mul(gradient, activation, out=scratch).abs_().sum())
            for region, stand_in in differences:
                product = torch.sub(full_precision(activation), stand_in, out=scratch).mul_(gradient)
                channels = product.flatten(2).sum(2) if product.ndim > 2 else product
                record.add("fisher", region, channels.square().sum())
                record.add("grad_delta", region, product.abs_().sum())

        value.register_hook(hook)  # type: ignore[no-untyped-call]
        return value

    def _stand_in(self, region: Region) -> Tensor:
        value = self.stand_ins[region.stand_in]
        value = self.maps[region.name](value) if region.name in self.maps else value
        return value.contiguous() if region.contiguous else value


def _require_grad(value: Tensor) -> Tensor:
    """Let gradients reach the output of a layer, even if all weights are frozen."""
    if value.is_floating_point() and not value.requires_grad and torch.is_grad_enabled():
        return value.detach().requires_grad_()
    return value
