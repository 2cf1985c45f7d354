"""Fits, for each region, the linear map of its stand-in that is nearest to the region's output.

Healing fits the layers behind a removed region (`heal="affine"`, and `heal="mimic"`, which starts with it). A
convolution behind the region can absorb a linear map of the stand-in's channels into its weights. So only the
difference between the region's output and the best such map is lost. `criterion="fisher_mended"` measures this
difference.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.attribution.recorder import StandInInterpreter
from fxprune.capture.channels import concatenated_values, input_convolutions
from fxprune.graph.fx_utils import class_names, full_precision
from fxprune.graph.interpreters import NodeName
from fxprune.graph.operators import ADDITIONS
from fxprune.graph.records import RESULTS, Link, Region
from fxprune.runtime.distributed import all_gather, all_reduce_sum

RELATIVE_RIDGE = 1e-3
"""Ridge penalty on the matrix W of a `LinearMap`, relative to the mean square of the stand-in."""
MAX_PLACES = 4096
"""Most positions of the feature maps of one call that are used in a fit."""

LINEAR_MODULES = ("torch.nn.modules.pooling.AvgPool", "torch.nn.modules.pooling.AdaptiveAvgPool",
                  "torch.nn.modules.upsampling.", "torch.nn.modules.flatten.Flatten",
                  "torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.",
                  "torch.nn.modules.batchnorm.", "torchvision.ops.misc.FrozenBatchNorm2d")  # fmt: skip
"""Prefixes of class names of modules that are linear in a value at inference and keep its channels."""
FLATTENING_PREFIXES = ("AdaptiveAvgPool", "Flatten", "adaptive_avg_pool", "flatten", "mean")
"""Prefixes of names of operations that flatten feature maps, so that a linear layer reads their channels."""
SHAPE_FUNCTIONS = frozenset({"view", "reshape", "transpose", "chunk", "split", "unbind", "getitem"})
"""Names of functions and methods that only move values. The search for linear layers does not follow channels there."""
LINEAR_FUNCTIONS = (
    SHAPE_FUNCTIONS
    | {"interpolate", "avg_pool2d", "adaptive_avg_pool2d", "mean", "flatten", "contiguous", "pad"}
    | {"dropout", "size", "getattr"}
)
"""Names of functions and methods that are linear in their input; the last two read no values."""


@dataclass(frozen=True)
class LinearMap:
    """The map ``s -> s + W s + b`` over channels, at every position.

    Channels are the second dimension of feature maps (N, C, H, W), and the last dimension of other values.

    Attributes
    ----------
    matrix : Tensor
        ``[W, b]`` transposed, of shape (C + 1, C).
    """

    matrix: Tensor = field(repr=False)

    def __call__(self, value: Tensor) -> Tensor:
        """Apply the map to a value with C channels, of any other sizes."""
        rows = _to_rows(value)
        with torch.autocast(value.device.type, enabled=False):
            change = torch.addmm(self.matrix[-1], rows, self.matrix[:-1])
        if value.ndim <= 3:
            return value + change.reshape(value.shape)
        return value + change.reshape(value.movedim(1, -1).shape).movedim(-1, 1)


def _to_rows(value: Tensor) -> Tensor:
    """Return features as float32 rows (n, C), one per position; channels are second in (N, C, H, W), else last."""
    rows = value.movedim(1, -1) if value.ndim > 3 else value
    return full_precision(rows.reshape(-1, rows.shape[-1]))


GramSums = dict[str, tuple[Tensor, Tensor]]
"""By region, sums over positions of the products of ``[s, 1]`` with itself and with ``y - s``."""


class GramInterpreter(StandInInterpreter):
    """Runs a graph and sums the products from which the map of each region is solved, see `GramSums`.

    Parameters
    ----------
    gm : GraphModule
        The graph.
    regions : sequence of Region
        The regions of the graph to fit maps for.
    sums : dict
        The sums by region name. They are updated in place.
    """

    def __init__(self, gm: fx.GraphModule, regions: Sequence[Region], sums: GramSums) -> None:
        super().__init__(gm, regions)
        self.sums = sums

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; at the exit of a region, add its products to the sums."""
        value = super().run_node(n)
        if n.name in self.stand_in_names:
            self.stand_ins[n.name] = value
        for region in self.regions_by_exit.get(n.name, ()):
            self._add(region, self.stand_ins[region.stand_in], value)
        return value

    def _add(self, region: Region, stand_in: Tensor, value: Tensor) -> None:
        rows, targets = _to_rows(stand_in), _to_rows(value)
        if len(rows) > MAX_PLACES:
            place = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MAX_PLACES].to(rows.device)
            rows, targets = rows[place], targets[place]
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        with torch.autocast(rows.device.type, enabled=False):
            products = (rows.T @ rows).double(), (rows.T @ (targets - rows[:, :-1])).double()
        before = self.sums.get(region.name)
        self.sums[region.name] = products if before is None else (before[0] + products[0], before[1] + products[1])


def solve_linear_maps(sums: GramSums) -> dict[str, LinearMap]:
    """Return the map of each region by least squares over the positions of all processes."""
    widths = {name: width for part in all_gather({name: len(gram) for name, (gram, _) in sums.items()})
              for name, width in part.items()}  # fmt: skip
    like = next((gram for gram, _ in sums.values()), torch.empty(0, dtype=torch.float64))
    maps = {}
    for name, width in sorted(widths.items()):
        gram, cross = sums.get(name, (like.new_zeros(width, width), like.new_zeros(width, width - 1)))
        gram, cross = all_reduce_sum(gram), all_reduce_sum(cross)
        ridge = torch.full_like(gram[0], RELATIVE_RIDGE * float(gram.diagonal()[:-1].mean().clamp_min(1e-12)))
        ridge[-1] = 1e-9 * gram[-1, -1]  # almost no penalty on b
        maps[name] = LinearMap(solve_positive_definite(gram + torch.diag(ridge), cross).float())
    return maps


def linearly_absorbable(
    graphs: Iterable[tuple[str, fx.GraphModule]], links: Sequence[Link], regions: Sequence[Region]
) -> Iterator[Region]:
    """Yield the regions whose output is read only by layers that can absorb a linear map into their weights.

    These layers are convolutions with one group, and linear layers behind a pooling. They may read the output directly
    or through operations that are linear, in the region's graph or in a graph that reads the output of that graph.
    """
    known = dict(graphs)
    nodes = {(island, node.name): node for island, gm in known.items() for node in gm.graph.nodes}
    for region in regions:
        if _AbsorptionCheck(known, links).can_absorb(region.island, nodes[region.island, region.exit]):
            yield region


class _AbsorptionCheck:
    """Follows a value to all of its readers."""

    def __init__(self, graphs: Mapping[str, fx.GraphModule], links: Sequence[Link]) -> None:
        self.graphs, self.links, self.seen = graphs, links, set[NodeName]()

    def can_absorb(self, island: str, value: fx.Node, flat: bool = False) -> bool:
        """Whether all readers can absorb a linear map of a value; `flat`: a linear layer reads its channels."""
        fresh = [user for user in value.users if (island, user.name) not in self.seen]
        self.seen |= {(island, user.name) for user in fresh}
        return all(self._reader_can_absorb(island, user, flat) for user in fresh)

    def _reader_can_absorb(self, island: str, reader: fx.Node, flat: bool) -> bool:
        gm = self.graphs[island]
        if reader.op == "output":
            return self._islands_can_absorb(island)
        if reader.op != "call_module":
            name = str(getattr(reader.target, "__name__", reader.target)).strip("_")
            linear = (
                reader.target in {*ADDITIONS, operator.iadd} or name in LINEAR_FUNCTIONS or concatenated_values(reader)
            )
            flat = (flat or name.startswith(FLATTENING_PREFIXES)) and name not in SHAPE_FUNCTIONS
            return bool(linear) and self.can_absorb(island, reader, flat)
        layer = gm.get_submodule(str(reader.target))
        if isinstance(layer, nn.Linear):
            return flat
        kind = class_names(layer)[0]
        if kind.startswith(LINEAR_MODULES):
            return self.can_absorb(island, reader, flat or type(layer).__name__.startswith(FLATTENING_PREFIXES))
        return _mixes_channels(layer)

    def _islands_can_absorb(self, island: str) -> bool:
        """Whether only other graphs read the output of a graph, and all of them can absorb a linear map."""
        targets = [link.target for link in self.links if link.source == island]
        if not targets or RESULTS in targets:
            return False
        reads = ((name, node) for name in targets for node in self.graphs[name].graph.nodes if node.op == "placeholder")
        return all(self.can_absorb(name, node) for name, node in reads)


def _mixes_channels(layer: nn.Module) -> bool:
    """Whether a layer starts with convolutions of one group, so over all channels."""
    paths = input_convolutions(layer) or []
    return bool(paths) and all(getattr(layer.get_submodule(path), "groups", 0) == 1 for path in paths)


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` by a Cholesky factorization, one system at a time.

    A batch is solved in a loop: with several threads, torch's batched solutions may be wrong (pytorch issue 142815).

    Parameters
    ----------
    matrix : Tensor
        Shape (n, n) or (G, n, n), symmetric and positive definite.
    right : Tensor
        Shape (n, k) or (G, n, k).

    Returns
    -------
    Tensor
        Solution in the shape of `right`; NaN if the matrix contains NaN or infinity.

    Examples
    --------
    >>> solve_positive_definite(2 * torch.eye(2), torch.ones(2, 1)).flatten()
    tensor([0.5000, 0.5000])
    """
    if matrix.ndim == 3:
        return torch.stack([solve_positive_definite(*pair) for pair in zip(matrix, right, strict=True)])
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(matrix).L)
