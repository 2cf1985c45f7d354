"""Defines the criteria: functions that compute the importance of each region, in one table by name."""

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
    """Inputs of a criterion.

    Attributes
    ----------
    regions : sequence of Region
        All regions.
    record : AttributionRecord
        Record of one forward and one backward pass per batch.
    modules : mapping of str to Module
        The model's modules by dotted path, including those in `Region.layers`.
    seed : int
        Seed for criteria that draw random numbers.
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
        ``(ScoringInputs) -> dict`` of one score per region, by region name.
    loss : callable
        ``(Tensor (P,)) -> scalar Tensor``: combines the parts of a batch's loss. The gradient is taken of the result.
    gate : float
        Gate of all regions during the forward and backward pass, see `RecordingInterpreter`.
    linear_recovery : bool
        Whether a region's output is compared with the best linear map of its stand-in instead of the stand-in itself.
        Only for regions whose readers can absorb such a map, see `fxprune.attribution.linear_recovery`.
    """

    score: Callable[[ScoringInputs], dict[str, float]]
    loss: Callable[[Tensor], Tensor] = torch.sum
    gate: float = 1.0
    linear_recovery: bool = False


RegionScore = Callable[[Region, Mapping[str, nn.Module]], float]
"""The caller's own criterion: ``(region, modules with weights by dotted path) -> float``; larger is more important."""


def _grad_act(inputs: ScoringInputs) -> dict[str, float]:
    """Return ``E_x [sum_i |dL/dy_i y_i|]`` at the exit value y: the score of a layer in arXiv 2602.14040."""
    nodes = inputs.record.grad_act
    scores = {region.name: nodes.get((region.island, region.exit), 0.0) for region in inputs.regions}
    return {name: score for name, score in scores.items() if score}  # a score of 0: no gradient reached the region


def _grad_delta(inputs: ScoringInputs) -> dict[str, float]:
    """Return ``E_x [sum_i |dL/dy_i (y_i - s_i)|]``: as `_grad_act`, with the stand-in s subtracted from y."""
    return {name: inputs.record.grad_delta[name] for name in _grad_act(inputs)}


def _fisher(inputs: ScoringInputs) -> dict[str, float]:
    """Return ``(E_x [sum_c (dL/da_c)^2])^2`` for gates a_c on a region's channels: ``s_c + a_c (y_c - s_c)``.

    The expectation is the Fisher information of the gates. It is the second-order estimate of the loss increase when
    the gates are closed (Theis et al., arXiv 1801.05787; Molchanov et al., arXiv 1906.10771, also square the sum over a
    filter). There are three differences: a closed gate outputs the stand-in s and not zero, the parts of the loss are
    relative (`relative_loss`), and all gates are at `FISHER_GATE`. The expectation is squared because scores are added
    up: one large loss increase is worse than several small ones of the same sum.
    """
    return {name: inputs.record.fisher[name] ** 2 for name in _grad_act(inputs)}


FISHER_GATE = 0.9
"""Gate of all regions under the criterion ``"fisher"``. At 1, the loss of a trained detector is flat, and gradients say
little about the effect of a whole removal. At .8, the outputs of deep networks are already useless
(`benchmarks.bench_criteria`)."""
MIN_PART_SHARE = 1e-3
"""Smallest size of a part of a loss, as a share of the whole loss, in `part_sizes`."""


def relative_loss(parts: Tensor) -> Tensor:
    """Divide every part (P,) of a loss by its own size and sum: the gradient is that of the sum of their logarithms.

    The parts of a detector's loss have very different sizes. In a plain sum, an increase of a small part would not be
    visible (the proposals' part of Faster R-CNN is 2 % of the sum), but the detector does not work without it.
    """
    return (parts / part_sizes(parts)).sum()


def part_sizes(parts: Tensor) -> Tensor:
    """Return the size of each part (P,) of a loss, at least `MIN_PART_SHARE` of their sum; 1 for a single part."""
    sizes = parts.detach().abs()
    if len(sizes) == 1:
        return torch.ones_like(sizes)
    return sizes.clamp_min(max(MIN_PART_SHARE * float(sizes.sum()), torch.finfo(sizes.dtype).tiny))


def weight_norm(region: Region, modules: Mapping[str, nn.Module]) -> float:
    """Return the sum of ``|W|`` over a region's weights of two or more dimensions: the L1 score of arXiv 2602.14040."""
    return absolute_weights(modules.values())


def absolute_weights(modules: Iterable[nn.Module]) -> float:
    """Return the sum of ``|W|`` over the modules' weights of two or more dimensions; shared weights count once."""
    weights = {id(w): w for module in modules for w in module.parameters() if w.ndim >= 2}
    return float(sum(weight.detach().abs().sum(dtype=torch.float64) for weight in weights.values()))


def _random(inputs: ScoringInputs) -> dict[str, float]:
    """Return uniform random numbers in [0, 1)."""
    generator = torch.Generator().manual_seed(inputs.seed)
    draws = torch.rand(len(inputs.regions), generator=generator, dtype=torch.float64).tolist()
    return dict(zip((region.name for region in inputs.regions), draws, strict=True))


def score_each_region(criterion: RegionScore) -> Callable[[ScoringInputs], dict[str, float]]:
    """Return a function that scores all regions with a criterion for a single region."""

    def score(inputs: ScoringInputs) -> dict[str, float]:
        scores = {}
        for region in inputs.regions:
            modules = {path: inputs.modules[path] for path in region.layers if path in inputs.modules}
            value = criterion(region, modules)
            try:
                scores[region.name] = float(value)
            except (TypeError, ValueError):
                raise SettingError(
                    f"the criterion gave {value!r} for region {region.name!r}; scores must be finite numbers"
                ) from None
        return scores

    return score


CRITERIA: dict[str, Criterion] = {
    "fisher": Criterion(_fisher, loss=relative_loss, gate=FISHER_GATE),
    "fisher_mended": Criterion(_fisher, loss=relative_loss, gate=FISHER_GATE, linear_recovery=True),
    "grad_delta": Criterion(_grad_delta),
    "grad_act": Criterion(_grad_act),
    "l1": Criterion(score_each_region(weight_norm)),
    "random": Criterion(_random),
}
"""Criteria by name. A region that is not in the output of a criterion has no score and is never removed."""


def get_criterion(criterion: str | RegionScore) -> tuple[str, Criterion]:
    """Return a criterion and its name: look a name up, or wrap the caller's own function.

    Raises
    ------
    SettingError
        If the name is not known.
    """
    if callable(criterion):
        return getattr(criterion, "__name__", type(criterion).__name__), Criterion(score_each_region(criterion))
    check_choice("criterion", criterion, CRITERIA, others=", or a callable")
    return criterion, CRITERIA[criterion]
