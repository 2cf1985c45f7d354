"""The loop over calibration batches: one forward and one backward pass per batch, with every node recorded."""

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
from fxprune.graph.interpreters import gradients_in_graphs, run_with
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
        The captured model. Its graphs run in interpreters during the call.
    criterion : Criterion
        Defines the loss to differentiate and the gate of the regions.
    batches : iterable of Batch or None
        In order. None is a batch that another process works on.
    maps : mapping of str to LinearMap
        By region, the linear map that is applied to its stand-in.
    progress : callable
        ``progress("attribution", done, None)``.

    Returns
    -------
    record : AttributionRecord
        Record of the batches of all processes.
    links : tuple of Link
        Data flow between islands, from the first batch.
    count : int
        Number of batches, including those of other processes.

    Raises
    ------
    LossError
        If a loss or a gradient is not finite, or does not depend on the captured layers. The message names the batch.
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
            with gradients_in_graphs():
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
    """Fit the linear maps of stand-ins: one forward pass per batch, and one more on the first batch.

    Parameters
    ----------
    captured, batches, progress
        As for `record_attribution`.

    Returns
    -------
    dict of str to LinearMap
        By region. Only for regions whose readers can absorb a linear map.
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
    """Return the regions whose readers can all absorb a linear map. Runs the model once with gradients."""
    with torch.enable_grad(), run_with(captured.graphs, _make_tracking_interpreter), gradients_in_graphs():
        links = trace_dataflow(run, captured.graphs)[1]
    return list(linearly_absorbable(captured.graphs, links, captured.regions))


def _make_tracking_interpreter(island: str, gm: fx.GraphModule) -> fx.Interpreter:
    return RecordingInterpreter(gm, island, AttributionRecord(), ())


def _make_gram_interpreter(
    regions: Sequence[Region], sums: GramSums, island: str, gm: fx.GraphModule
) -> fx.Interpreter:
    return GramInterpreter(gm, [region for region in regions if region.island == island], sums)
