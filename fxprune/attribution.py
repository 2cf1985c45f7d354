"""Importance of regions: the criteria, and the interpreter that records what they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import LossError, SettingError
from fxprune.graph import is_weighted, map_tensors
from fxprune.interpreting import NodeName
from fxprune.regions import Region


@dataclass
class Record:
    """Sums of gradient times activation, batch by batch.

    Attributes
    ----------
    nodes : dict
        Per node ``E_x [sum_i |dL/dA_i * A_i|]``: the score of arXiv 2602.14040, expectation over the images seen.
    deltas : dict
        Per region ``E_x [sum_i |dL/dy_i * (y_i - s_i)|]``, y its exit value and s the value that would stand in.
    images : int
        Images seen.
    """

    nodes: dict[NodeName, float] = field(default_factory=dict)
    deltas: dict[str, float] = field(default_factory=dict)
    images: int = 0
    _pending: dict[NodeName | str, list[Tensor]] = field(default_factory=dict)
    _room: Tensor | None = None

    def add(self, key: NodeName | str, value: Tensor) -> None:
        """Note one term of the batch under way, of a node or of a region; nothing is read from the device yet."""
        self._pending.setdefault(key, []).append(value)

    def scratch(self, like: Tensor) -> Tensor:
        """Return room for a product, reused from one value to the next: large new tensors cost more than the sum."""
        if self._room is None or self._room.numel() < like.numel() or self._room.dtype != like.dtype:
            self._room = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return self._room[: like.numel()].view(like.shape)

    def close_batch(self, index: int, images: int) -> None:
        """Take the batch under way into the expectation.

        The loss is the mean over `images` of each image's own loss, so the terms already sum to a mean over them;
        batches count by their number of images.

        Raises
        ------
        LossError
            If a gradient held NaN or infinity; names the batch and the node, and takes nothing of it.
        """
        pending, self._pending = self._pending, {}
        sums = [torch.stack(terms).double().sum() for terms in pending.values()]
        means = dict(zip(pending, torch.stack(sums).tolist() if sums else [], strict=True))
        for key, value in means.items():
            if not math.isfinite(value):
                where = key if isinstance(key, str) else ".".join(filter(None, key))
                raise LossError(f"batch {index}: the gradient at {where!r} is NaN or infinite; leave that batch out")
        weight = images / (self.images + images)
        for known in (self.nodes, self.deltas):
            for key in known:
                known[key] *= 1 - weight  # type: ignore[index]
        for key, value in means.items():
            if isinstance(key, str):
                self.deltas[key] = self.deltas.get(key, 0.0) + weight * value
            else:
                self.nodes[key] = self.nodes.get(key, 0.0) + weight * value
        self.images += images


class RecordingInterpreter(fx.Interpreter):
    """Runs a graph and hooks every value: as its gradient comes, both become one number and are let go.

    Parameters
    ----------
    gm : GraphModule
        The graph.
    island : str
        Its path in the model.
    record : Record
        Where the numbers go.
    regions : sequence of Region
        The island's regions.
    """

    def __init__(self, gm: fx.GraphModule, island: str, record: Record, regions: Iterable[Region]) -> None:
        super().__init__(gm)
        self.island, self.record = island, record
        self.exits: dict[str, list[Region]] = {}
        for region in regions:
            self.exits.setdefault(region.exit, []).append(region)
        self.kept = {region.stand_in for found in self.exits.values() for region in found}
        self.stand_ins: dict[str, Tensor] = {}
        self.weighted = {node.name for node in gm.graph.nodes if is_weighted(gm, node)}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and hook its value."""
        value = super().run_node(n)
        if n.name in self.weighted:
            value = map_tensors(value, _tracked)
        if not isinstance(value, Tensor) or n.op in ("output", "get_attr"):
            return value
        if n.name in self.kept:
            self.stand_ins[n.name] = value.detach()
        if value.requires_grad:
            self._hook(n.name, value)
        return value

    def _hook(self, name: str, value: Tensor) -> None:
        activation = value.detach()
        differences = [(region.name, self.stand_ins[region.stand_in]) for region in self.exits.get(name, ())]

        def hook(gradient: Tensor) -> None:
            scratch = self.record.scratch(gradient)
            self.record.add((self.island, name), torch.mul(gradient, activation, out=scratch).abs_().sum())
            for region, stand_in in differences:
                difference = torch.sub(activation, stand_in, out=scratch)
                self.record.add(region, difference.mul_(gradient).abs_().sum())

        value.register_hook(hook)  # type: ignore[no-untyped-call]


def _tracked(value: Tensor) -> Tensor:
    """Make what a layer gives a value that gradients reach, even if all weights are frozen."""
    if value.is_floating_point() and not value.requires_grad and torch.is_grad_enabled():
        return value.detach().requires_grad_()
    return value


class AblationInterpreter(fx.Interpreter):
    """Runs a graph as if regions had been removed: their nodes are skipped, the stand-in is read in their place.

    Examples
    --------
    The loss with a region gone, no second graph made: ``AblationInterpreter(gm, [region]).run(x)``.
    """

    def __init__(self, gm: fx.GraphModule, regions: Iterable[Region]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.stand_ins: dict[str, str] = {}
        self.skipped: set[str] = set()
        for region in regions:
            self.stand_ins[region.exit] = region.stand_in
            self.skipped |= set(region.nodes) - {region.exit}
        self.nodes = {node.name: node for node in gm.graph.nodes}
        for node in gm.graph.nodes:  # what reads a skipped value is dead code, else it would be no region
            if node.name not in self.stand_ins and any(source.name in self.skipped for source in node.all_input_nodes):
                self.skipped.add(node.name)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, skip it, or read its stand-in."""
        if n.name in self.stand_ins:
            return self.env[self.nodes[self.stand_ins[n.name]]]
        if n.name in self.skipped:
            return None
        return super().run_node(n)


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes
    ----------
    regions : sequence of Region
        All regions.
    record : Record
        Of one forward and backward pass per batch.
    modules : mapping of str to Module
        The model's modules by dotted path; `Region.layers` are among them.
    loss_increase : callable
        ``(Region) -> float``: mean over all calibration images of the loss without the region minus the loss with it.
    seed : int
        For criteria that draw.
    """

    regions: Sequence[Region]
    record: Record
    modules: Mapping[str, nn.Module]
    loss_increase: Callable[[Region], float]
    seed: int


@dataclass(frozen=True)
class Criterion:
    """A way to score regions: `score` gives one number a region; `keeps_batches` if it needs them all again."""

    score: Callable[[Evidence], dict[str, float]]
    keeps_batches: bool = False


RegionScore = Callable[[Region, Mapping[str, nn.Module]], float]
"""A caller's own criterion: the region, and its modules with weights by dotted path; larger is more important."""


def _grad_act(evidence: Evidence) -> dict[str, float]:
    nodes = evidence.record.nodes
    found = {region.name: nodes.get((region.island, region.exit), 0.0) for region in evidence.regions}
    return {name: score for name, score in found.items() if score}  # zero throughout: the loss does not see it


def _grad_delta(evidence: Evidence) -> dict[str, float]:
    return {name: evidence.record.deltas[name] for name in _grad_act(evidence)}


def weight_norm(region: Region, modules: Mapping[str, nn.Module]) -> float:
    """Sum of ``|W|`` over a region's weights of two dimensions or more (arXiv 2602.14040, its L1 baseline)."""
    return absolute_weights(modules.values())


def absolute_weights(modules: Iterable[nn.Module]) -> float:
    """Sum of ``|W|`` over the weights of two dimensions or more of some modules, shared ones once."""
    weights = {id(w): w for module in modules for w in module.parameters() if w.ndim >= 2}
    return float(sum(weight.detach().abs().sum(dtype=torch.float64) for weight in weights.values()))


def _ablation(evidence: Evidence) -> dict[str, float]:
    return {region.name: evidence.loss_increase(region) for region in evidence.regions}


def _random(evidence: Evidence) -> dict[str, float]:
    generator = torch.Generator().manual_seed(evidence.seed)
    draws = torch.rand(len(evidence.regions), generator=generator, dtype=torch.float64).tolist()
    return dict(zip((region.name for region in evidence.regions), draws, strict=True))


def each_region(criterion: RegionScore) -> Callable[[Evidence], dict[str, float]]:
    """Make a criterion over all regions from one over a single region and its modules."""

    def score(evidence: Evidence) -> dict[str, float]:
        found = {}
        for region in evidence.regions:
            modules = {path: evidence.modules[path] for path in region.layers if path in evidence.modules}
            value = criterion(region, modules)
            try:
                found[region.name] = float(value)
            except (TypeError, ValueError):
                raise SettingError(
                    f"the criterion gave {value!r} for region {region.name!r}; scores must be finite numbers"
                ) from None
        return found

    return score


CRITERIA: dict[str, Criterion] = {
    "grad_delta": Criterion(_grad_delta),
    "grad_act": Criterion(_grad_act),
    "l1": Criterion(each_region(weight_norm)),
    "ablation": Criterion(_ablation, keeps_batches=True),
    "random": Criterion(_random),
}
"""Criteria by name. A region that a criterion leaves out has no score and is not pruned."""


def criterion_named(criterion: str | RegionScore) -> tuple[str, Criterion]:
    """Look a criterion up by name, or wrap the caller's own.

    Raises
    ------
    SettingError
        If the name is not known.
    """
    if callable(criterion):
        return getattr(criterion, "__name__", type(criterion).__name__), Criterion(each_region(criterion))
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise SettingError(f"criterion {criterion!r} is not known; known: {', '.join(CRITERIA)}, or a callable")
    return criterion, CRITERIA[criterion]
