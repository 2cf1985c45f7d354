"""The loop over calibration batches: one forward and one backward pass each, every node recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from fxprune.adapters.protocol import Batch
from fxprune.attribution.captured_model import CapturedModel
from fxprune.attribution.criteria import Criterion
from fxprune.attribution.dataflow import trace_dataflow
from fxprune.attribution.linear_recovery import (
    GramInterpreter,
    GramSums,
    LinearMap,
    linearly_absorbable,
    solve_linear_maps,
)
from fxprune.attribution.recorder import AttributionRecord, RecordingInterpreter, merge_records
from fxprune.errors import LossError
from fxprune.graph.interpreters import run_with
from fxprune.graph.records import Link, Region
from fxprune.runtime.distributed import all_gather, raise_on_all_ranks, run_on_rank_zero
from fxprune.runtime.progress import Progress


def record_attribution(
    captured: CapturedModel,
    criterion: Criterion,
    batches: Iterable[Batch | None],
    maps: Mapping[str, LinearMap],
    progress: Progress,
) -> tuple[AttributionRecord, tuple[Link, ...], int]:
    """Run every batch forward and backward, and record all nodes.

    Parameters
    ----------
    captured : CapturedModel
        Its graphs are interpreted meanwhile.
    criterion : Criterion
        Says what the gradient is taken of, and how far regions are open.
    batches : iterable of Batch or None
        In order; None stands for one that another process works on.
    maps : mapping of str to LinearMap
        By region, what is made of the value that stands in for it.
    progress : callable
        ``progress("attribution", done, None)``.

    Returns
    -------
    record : AttributionRecord
        Of the batches of all processes.
    links : tuple of Link
        Data flow between islands, from the first batch.
    count : int
        Batches, those of other processes included.

    Raises
    ------
    LossError
        If a loss or a gradient is not finite, or does not depend on the captured layers; names the batch.
    """
    record, links, count = AttributionRecord(), tuple[Link, ...](), 0

    def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
        return RecordingInterpreter(gm, island, record, captured.regions_of(island), criterion.gate, maps)

    with raise_on_all_ranks(), run_with(captured.graphs, make):
        for index, batch in enumerate(batches):
            count += 1
            if batch is None:
                continue
            run = partial(captured.adapted.loss, index, batch)
            parts, links = (run(), links) if record.images else trace_dataflow(run, captured.graphs)
            if not parts.requires_grad:
                raise LossError(f"batch {index}: the loss does not depend on the model's captured layers")
            criterion.loss(parts).backward()  # type: ignore[no-untyped-call]
            record.close_batch(index, batch.count, batch.own_targets)
            progress("attribution", index + 1, None)
    record = merge_records(all_gather(record))
    if not record.grad_act:
        raise LossError("no gradient reached any captured layer: the loss does not depend on the model")
    return record, run_on_rank_zero(lambda: links), count


def fit_recovery_maps(
    captured: CapturedModel, batches: Iterable[Batch | None], progress: Progress
) -> Mapping[str, LinearMap]:
    """Fit the linear maps that layers behind regions can take in: one forward pass per batch, and one of the first.

    Parameters
    ----------
    captured, batches, progress
        As of `record_attribution`.

    Returns
    -------
    dict of str to LinearMap
        By region; only regions whose readers can take a linear map in.
    """
    sums: GramSums = {}
    with raise_on_all_ranks(), torch.no_grad():
        regions: Sequence[Region] | None = None
        for index, batch in enumerate(batches):
            if batch is None:
                continue
            run = partial(captured.adapted.loss, index, batch)
            if regions is None:
                regions = _recoverable_regions(captured, run)
            with run_with(captured.graphs, partial(_make_gram_interpreter, regions, sums)):
                run()
            progress("stand-ins", index + 1, None)
    return solve_linear_maps(sums)


def _recoverable_regions(captured: CapturedModel, run: Callable[[], Tensor]) -> list[Region]:
    """Regions all of whose readers can take a linear map in; found in a run with gradients."""
    with torch.enable_grad(), run_with(captured.graphs, _make_tracking_interpreter):
        links = trace_dataflow(run, captured.graphs)[1]
    return list(linearly_absorbable(captured.graphs, links, captured.regions))


def _make_tracking_interpreter(island: str, gm: fx.GraphModule) -> fx.Interpreter:
    return RecordingInterpreter(gm, island, AttributionRecord(), ())


def _make_gram_interpreter(
    regions: Sequence[Region], sums: GramSums, island: str, gm: fx.GraphModule
) -> fx.Interpreter:
    return GramInterpreter(gm, [region for region in regions if region.island == island], sums)
