"""How important a region is: the criteria, one table of named functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.attribution.recorder import AttributionRecord
from fxprune.errors import SettingError
from fxprune.graph.records import Region
from fxprune.runtime.options import check_choice


@dataclass(frozen=True)
class ScoringInputs:
    """What a criterion may look at.

    Attributes
    ----------
    regions : sequence of Region
        All regions.
    record : Record
        Of one forward and backward pass per batch.
    modules : mapping of str to Module
        The model's modules by dotted path; `Region.layers` are among them.
    seed : int
        For criteria that draw.
    """

    regions: Sequence[Region]
    record: AttributionRecord
    modules: Mapping[str, nn.Module]
    seed: int


@dataclass(frozen=True)
class Criterion:
    """A way to score regions.

    Attributes
    ----------
    score : callable
        Gives one number a region.
    loss : callable
        Makes one number of the parts of a batch's loss, to take the gradient of.
    gate : float
        How far regions are open while it is taken; see `RecordingInterpreter`.
    linear_recovery : bool
        Whether regions are measured against the linear map of what stands in for them that comes nearest to what they
        give, where what reads them can take that in; see `fxprune.attribution.linear_recovery`.
    """

    score: Callable[[ScoringInputs], dict[str, float]]
    loss: Callable[[Tensor], Tensor] = torch.sum
    gate: float = 1.0
    linear_recovery: bool = False


RegionScore = Callable[[Region, Mapping[str, nn.Module]], float]
"""A caller's own criterion: the region, and its modules with weights by dotted path; larger is more important."""


def _grad_act(evidence: ScoringInputs) -> dict[str, float]:
    """``E_x [sum_i |dL/dy_i y_i|]`` at the exit value y: the score of a layer in arXiv 2602.14040."""
    nodes = evidence.record.grad_act
    found = {region.name: nodes.get((region.island, region.exit), 0.0) for region in evidence.regions}
    return {name: score for name, score in found.items() if score}  # zero throughout: the loss does not see it


def _grad_delta(evidence: ScoringInputs) -> dict[str, float]:
    """``E_x [sum_i |dL/dy_i (y_i - s_i)|]``: the same, measured against what will stand in for the region, s."""
    return {name: evidence.record.grad_delta[name] for name in _grad_act(evidence)}


def _fisher(evidence: ScoringInputs) -> dict[str, float]:
    """``(E_x [sum_c (dL/da_c)^2])^2``, a_c gates on a region's channels that let ``s_c + a_c (y_c - s_c)`` through.

    Inside is the Fisher information of the gates, the second-order estimate of what closing them costs (Theis et al.,
    arXiv 1801.05787; Molchanov et al., arXiv 1906.10771, square the sum over a filter alike). Here closed means what
    will stand in for the region, not zero, the parts of the loss are relative, and all gates stand at `FISHER_GATE`. It
    is squared because scores are added up: one large damage is worse than several small ones of the same sum.
    """
    return {name: evidence.record.fisher[name] ** 2 for name in _grad_act(evidence)}


FISHER_GATE = 0.9
"""How far regions are open under the criterion ``"fisher"``: at 1 a trained detector's loss is flat and gradients say
little of what a whole removal does; at .8 deep networks are broken already (`benchmarks.bench_criteria`)."""
MIN_PART_SHARE = 1e-3
"""A part of a loss under this share of the whole counts as this share, where parts are weighed by their size."""


def relative_loss(parts: Tensor) -> Tensor:
    """Weigh every part (P,) of a loss by its own size: the gradient is that of the sum of their logarithms.

    Detectors add parts of very different sizes. What a removal does to a small one (the proposals' part of Faster
    R-CNN is 2 % of the sum) would not be seen, though the detector is nothing without it.
    """
    return (parts / part_sizes(parts)).sum()


def part_sizes(parts: Tensor) -> Tensor:
    """Sizes (P,) that the parts of a loss are measured in, see `MIN_PART_SHARE`; a single part stays as it is."""
    sizes = parts.detach().abs()
    if len(sizes) == 1:
        return torch.ones_like(sizes)
    return sizes.clamp_min(max(MIN_PART_SHARE * float(sizes.sum()), torch.finfo(sizes.dtype).tiny))


def weight_norm(region: Region, modules: Mapping[str, nn.Module]) -> float:
    """Sum of ``|W|`` over a region's weights of two dimensions or more (arXiv 2602.14040, its L1 baseline)."""
    return absolute_weights(modules.values())


def absolute_weights(modules: Iterable[nn.Module]) -> float:
    """Sum of ``|W|`` over the weights of two dimensions or more of some modules, shared ones once."""
    weights = {id(w): w for module in modules for w in module.parameters() if w.ndim >= 2}
    return float(sum(weight.detach().abs().sum(dtype=torch.float64) for weight in weights.values()))


def _random(evidence: ScoringInputs) -> dict[str, float]:
    """Uniform draws."""
    generator = torch.Generator().manual_seed(evidence.seed)
    draws = torch.rand(len(evidence.regions), generator=generator, dtype=torch.float64).tolist()
    return dict(zip((region.name for region in evidence.regions), draws, strict=True))


def score_each_region(criterion: RegionScore) -> Callable[[ScoringInputs], dict[str, float]]:
    """Make a criterion over all regions from one over a single region and its modules."""

    def score(evidence: ScoringInputs) -> dict[str, float]:
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
    "fisher": Criterion(_fisher, loss=relative_loss, gate=FISHER_GATE),
    "fisher_mended": Criterion(_fisher, loss=relative_loss, gate=FISHER_GATE, linear_recovery=True),
    "grad_delta": Criterion(_grad_delta),
    "grad_act": Criterion(_grad_act),
    "l1": Criterion(score_each_region(weight_norm)),
    "random": Criterion(_random),
}
"""Criteria by name. A region that a criterion leaves out has no score and is not pruned."""


def get_criterion(criterion: str | RegionScore) -> tuple[str, Criterion]:
    """Look a criterion up by name, or wrap the caller's own.

    Raises
    ------
    SettingError
        If the name is not known.
    """
    if callable(criterion):
        return getattr(criterion, "__name__", type(criterion).__name__), Criterion(score_each_region(criterion))
    check_choice("criterion", criterion, CRITERIA, others=", or a callable")
    return criterion, CRITERIA[criterion]
