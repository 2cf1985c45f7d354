"""Prepares a detector for Torch-Pruning: a copy, the layers to leave alone, the gradients of the loss.

Output layers must keep their channels. They are found in the autograd graph: the layers whose output no other layer
reads. If pruning a whole detector fails, other ways are tried that Torch-Pruning's examples and users know (`WAYS`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.adapters.calls import batch_loss, normalize_and_label
from fxprune.adapters.protocol import Adapter, Batch
from fxprune.adapters.registry import choose_adapter
from fxprune.graph.interpreters import Graphs
from fxprune.profiling.flops_params import count_flops
from fxprune.runtime.private_copy import private_copy

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
"""Kinds of layers that have channels to prune."""


@dataclass(frozen=True)
class Way:
    """One way to prepare a detector.

    Attributes
    ----------
    name : str
        A description, as it stands in the tables.
    part : str
        Submodule whose channels are pruned; empty for the whole network.
    unsplit : bool
        Whether ultralytics' C2f blocks are rewritten first, as in the peer's own YOLOv8 example.
    spare_splits : bool
        Whether layers whose output goes to a split are left alone as well.
    """

    name: str
    part: str = ""
    unsplit: bool = False
    spare_splits: bool = False


WAYS = (
    Way("whole network, output layers ignored"),
    Way("C2f blocks rewritten without the split", unsplit=True),
    Way("layers before a split ignored too", spare_splits=True),
    Way("backbone only", part="backbone"),
)
"""In the order they are tried."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A detector prepared for pruning.

    Attributes
    ----------
    model : Module
        A copy. All its weights take gradients, since the peer ignores those that do not.
    adapter : Adapter
        The adapter of its family.
    example : Batch
        Two labelled images.
    way : Way
        How it was prepared.
    outputs : tuple of str
        Layers whose output no other layer reads.
    ignored : tuple of str
        Layers to leave alone: the outputs, and more in some ways.
    frozen : frozenset of str
        Parameters that take no gradients in the detector as it was given.
    flops : int
        Of one inference on `example`.
    gradients : mapping of str to Tensor
        Of the loss, summed over the calibration batches.
    seconds : float
        Wall time of the gradients.
    """

    model: nn.Module
    adapter: Adapter
    example: Batch
    way: Way
    outputs: tuple[str, ...]
    ignored: tuple[str, ...]
    frozen: frozenset[str]
    flops: int
    gradients: Mapping[str, Tensor]
    seconds: float


def list_ways(model: nn.Module) -> Iterator[Way]:
    """List the ways that apply to this detector."""
    for way in WAYS:
        if way.unsplit and not any(is_c2f(module) for module in model.modules()):
            continue
        if not way.part or hasattr(model, way.part):
            yield way


def prepare(model: nn.Module, batches: Sequence[Any], way: Way) -> Prepared:
    """Copy a detector, find the layers to leave alone, and compute the gradients of its loss."""
    frozen = frozenset(name for name, value in model.named_parameters() if not value.requires_grad)
    twin = private_copy(model)
    if way.unsplit:
        rewrite_c2f_blocks(twin)
    adapter = choose_adapter(twin, batches[0], None)
    adapter.prepare(twin)
    example = normalize_and_label(twin, adapter, take_two_images(batches[0]), 0)
    fixed = set() if all(not value.requires_grad for value in model.parameters()) else frozen
    for name, value in twin.named_parameters():
        value.requires_grad_(value.is_floating_point() and name not in fixed)
    outputs = find_outputs(twin, adapter, example, way.part)
    for value in twin.parameters():
        value.requires_grad_(value.is_floating_point())
    ignored = (*outputs, *find_split(twin, adapter, example, outputs)) if way.spare_splits else outputs
    flops = count_inference_flops(twin, adapter, example)
    started = time.perf_counter()
    gradients = sum_gradients(twin, adapter, batches)
    seconds = time.perf_counter() - started
    return Prepared(twin, adapter, example, way, outputs, ignored, frozen, flops, gradients, seconds)


def take_two_images(raw: Any) -> Any:
    """Take the first two images of a labelled batch, with their labels."""
    if not isinstance(raw, Mapping):
        return tuple(part[:2] for part in raw)
    keep = raw["batch_idx"] < 2
    return {"img": raw["img"][:2]} | {key: raw[key][keep] for key in ("cls", "bboxes", "batch_idx")}


def find_outputs(model: nn.Module, adapter: Adapter, example: Batch, part: str) -> tuple[str, ...]:
    """Find the layers of a part of the model whose output reaches no other layer of it.

    Layers without gradients do not count, such as the fixed convolution that decodes YOLO's boxes.
    """
    layers = [
        f"{part}.{name}" if part else name
        for name, layer in model.get_submodule(part).named_modules()
        if isinstance(layer, LAYERS) and layer.weight.requires_grad
    ]
    seen = record_outputs(model, adapter, example, layers)
    inner = find_ancestors(function for _, _, function in seen)
    return tuple(dict.fromkeys(name for name, _, function in seen if function not in inner))


def record_outputs(
    model: nn.Module, adapter: Adapter, example: Batch, names: Iterable[str]
) -> list[tuple[str, Tensor, Any]]:
    """Run the detector; returns name, output and autograd function of every call of the named layers."""
    seen: list[tuple[str, Tensor, Any]] = []

    def noting(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, inputs, output: seen.append((name, output, output.grad_fn))

    hooks = [model.get_submodule(name).register_forward_hook(noting(name)) for name in names]
    try:
        with torch.enable_grad():
            adapter.predict(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def find_ancestors(functions: Iterable[Any]) -> set[Any]:
    """Find all autograd functions that the given ones depend on."""
    found: set[Any] = set()
    stack = [before for function in functions for before, _ in function.next_functions]
    while stack:
        function = stack.pop()
        if function is not None and function not in found:
            found.add(function)
            stack += [before for before, _ in function.next_functions]
    return found


def find_split(model: nn.Module, adapter: Adapter, example: Batch, outputs: Sequence[str]) -> tuple[str, ...]:
    """Find the layers whose channels a split or chunk divides, by the peer's own graph."""
    import torch_pruning as tp

    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(
        model, example.images, forward_fn=make_tracer(adapter, example, outputs)
    )
    ignored = [model.get_submodule(name) for name in outputs]
    return tuple(
        names[group[0].dep.target.module]
        for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=list(LAYERS))
        if any(dep.target.type == tp.ops.OPTYPE.SPLIT for dep, _ in group)
    )


def make_tracer(adapter: Adapter, example: Batch, outputs: Sequence[str]) -> Callable[[nn.Module, Any], list[Tensor]]:
    """Make the function that the peer traces: one inference that returns the outputs of the output layers."""
    return lambda model, _: [output for _, output, _ in record_outputs(model, adapter, example, outputs)]


def count_inference_flops(model: nn.Module, adapter: Adapter, batch: Batch) -> int:
    """Count the FLOPs of one inference on a batch by torch's counter."""
    return count_flops(lambda: adapter.predict(model, batch), Graphs(model, ()))[0]


def sum_gradients(model: nn.Module, adapter: Adapter, batches: Sequence[Any]) -> dict[str, Tensor]:
    """Sum the gradients of the loss over batches, by parameter name; the model keeps none."""
    for index, raw in enumerate(batches):
        batch = normalize_and_label(model, adapter, raw, index)
        batch_loss(model, adapter, batch, index, seed=0).sum().backward()  # type: ignore[no-untyped-call]
    model.eval()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def is_c2f(module: nn.Module) -> bool:
    """Whether a module has the forward of ultralytics' C2f, which chunks channels."""
    forward = getattr(type(module), "forward", None)
    return forward.__qualname__ == "C2f.forward" if forward is not None else False


class UnsplitC2f(nn.Module):
    """A C2f block whose first convolution is split in two, so that no output is chunked; the function is the same."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        first, self.cv2, self.m = cast(Any, block).cv1, cast(Any, block).cv2, cast(Any, block).m
        width = first.conv.out_channels // 2
        self.cv0, self.cv1 = split_channels(first, slice(0, width)), split_channels(first, slice(width, 2 * width))
        for name in ("i", "f", "type"):  # ultralytics' records of the block's place in the network
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv0(x), self.cv1(x)]
        parts.extend(layer(parts[-1]) for layer in self.m)
        return cast(Tensor, self.cv2(torch.cat(parts, 1)))


def split_channels(block: nn.Module, channels: slice) -> nn.Module:
    """Copy a convolution with norm and activation, with only some of its output channels."""
    half: Any = copy.deepcopy(block)
    half.conv.weight = nn.Parameter(half.conv.weight[channels].clone())
    half.conv.out_channels = half.bn.num_features = len(half.conv.weight)
    for name in ("weight", "bias"):
        setattr(half.bn, name, nn.Parameter(getattr(half.bn, name)[channels].clone()))
    for name in ("running_mean", "running_var"):
        setattr(half.bn, name, getattr(half.bn, name)[channels].clone())
    return cast(nn.Module, half)


def rewrite_c2f_blocks(model: nn.Module) -> None:
    """Rewrite every C2f block of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_c2f(child):
                setattr(parent, name, UnsplitC2f(child))
