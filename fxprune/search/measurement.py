"""Measures what a pruned model still finds and how fast it is, on images that pruning did not use if there are enough.

The result is an entry of the plan's settings, ``"measured"``, which `fxprune.report` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.calls import AdaptedModel, isolated_run
from fxprune.adapters.custom_loss import Loss
from fxprune.adapters.protocol import Adapter, Batch
from fxprune.adapters.registry import unwrap
from fxprune.datasets.agreement import Found, compare_outputs, find, join_boxes
from fxprune.datasets.calibration import CalibrationSet, open_calibration
from fxprune.datasets.evaluation import average_precision, make_boxes
from fxprune.errors import BatchError
from fxprune.profiling.comparison import compare_latency
from fxprune.rewriting.history import note_in_last_plan
from fxprune.runtime.distributed import raise_on_all_ranks, run_on_rank_zero
from fxprune.runtime.json_text import replace_nonfinite
from fxprune.runtime.progress import Progress

MAX_IMAGES = 64
"""Largest number of images that are measured on."""
HELD_OUT, GIVEN, CALIBRATION = "held out", "given", "calibration"
"""Where the images come from: calibration images that were left out of scores and healing, others that the caller gave,
or calibration images that were used."""


@dataclass(frozen=True)
class MeasuringImages:
    """Images to measure on: batches with labels or without, the adapter that read them, and where they come from."""

    batches: tuple[Batch, ...] = field(repr=False)
    adapter: Adapter
    source: str


def hold_out_images(calibration: CalibrationSet) -> tuple[CalibrationSet, MeasuringImages]:
    """Divide calibration batches into those for scores and healing, and those to measure on.

    If there are too few to hold any out, all batches are for scores and healing, and some of these are measured on too.
    """
    rest, held_out = calibration.hold_out(MAX_IMAGES)
    if held_out is None:
        return calibration, MeasuringImages(_first_images(calibration.batches), calibration.adapter, CALIBRATION)
    return rest, MeasuringImages(held_out.batches, calibration.adapter, HELD_OUT)


def read_images(
    model: nn.Module, loader: Any, loss: Loss | None = None, seed: int = 0, source: str = GIVEN
) -> MeasuringImages:
    """Read batches to measure on, up to `MAX_IMAGES` images. They keep their labels, if they have any."""
    with isolated_run(unwrap(model), grad=False), raise_on_all_ranks():
        opened = open_calibration(model, loader, loss, seed, name="measure")
        return MeasuringImages(_first_images(opened.given_batches()), opened.adapted.adapter, source)


def _first_images(batches: Iterable[Batch]) -> tuple[Batch, ...]:
    """Return the first batches, until they have `MAX_IMAGES` images."""
    taken: list[Batch] = []
    for batch in batches:
        taken.append(batch)
        if sum(one.count for one in taken) >= MAX_IMAGES:
            break
    return tuple(taken)


def measure_pruned(pruned: nn.Module, original: nn.Module, images: MeasuringImages, progress: Progress) -> None:
    """Measure a pruned model against the original, and note the result in the settings of its last plan.

    A measurement that fails is noted with its reason; the pruned model is not lost. One process measures, the others
    wait for the result.
    """
    note = run_on_rank_zero(partial(_measure, original, pruned, images, progress))
    note_in_last_plan(unwrap(pruned), measured=replace_nonfinite(note))


def _measure(original: nn.Module, pruned: nn.Module, images: MeasuringImages, progress: Progress) -> dict[str, Any]:
    before = AdaptedModel.copy_of(original, images.adapter)
    after = before.copy_version(pruned)
    note: dict[str, Any] = {"source": images.source, "images": sum(batch.count for batch in images.batches)}
    with before.running(grad=False), after.running(grad=False):
        note |= _attempt("agreement", lambda: _compare_findings(before, after, images.batches, progress))
        note |= _attempt("latency", lambda: {"latency": compare_latency(before, after, images.batches[0]).to_dict()})
    progress("measure", len(images.batches), len(images.batches))
    return note


def _attempt(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a measurement, or the reason why it failed."""
    try:
        return measure()
    except Exception as error:  # any error of the model; the pruned model must not be lost for it
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {name: {"failed": f"{type(error).__name__}: {said[:300]}"}}


def _compare_findings(
    before: AdaptedModel, after: AdaptedModel, batches: Sequence[Batch], progress: Progress
) -> dict[str, Any]:
    """Return the agreement, and the quality of both versions where there are labels."""
    own, found = [], []
    for done, batch in enumerate(batches):
        progress("measure", done, len(batches))
        own.append(find(before, batch))
        found.append(find(after, batch))
    quality = _measure_quality(before.adapter, batches, own, found)
    return {"agreement": asdict(compare_outputs(own, found)), **({"quality": quality} if quality else {})}


def _measure_quality(
    adapter: Adapter, batches: Sequence[Batch], own: Sequence[Found], found: Sequence[Found]
) -> dict[str, Any]:
    """Return mAP or accuracy of both versions, on the batches with labels; empty if there are none."""
    labelled = [index for index, batch in enumerate(batches) if batch.targets is not None and not batch.own_targets]
    given = [batches[index] for index in labelled]
    name, score = ("accuracy", _accuracy) if isinstance(own[0], Tensor) else ("mAP", _mean_average_precision)
    try:
        before, after = (score(adapter, given, [outputs[index] for index in labelled]) for outputs in (own, found))
    except BatchError:  # there is no label or no labelled box
        return {}
    return {"name": name, "images": sum(batch.count for batch in given), "before": before, "after": after}


def _accuracy(adapter: Adapter, batches: Sequence[Batch], outputs: Sequence[Found]) -> float:
    """Return the share of images whose class is the label."""
    labels = [label for batch in batches if (label := adapter.true_classes(batch)) is not None]
    if not labels:
        raise BatchError("there are no labels")
    found = [row for row in outputs if isinstance(row, Tensor)]
    return float((torch.cat(labels).cpu() == torch.cat(found)).double().mean())


def _mean_average_precision(adapter: Adapter, batches: Sequence[Batch], outputs: Sequence[Found]) -> float:
    targets = [target for batch in batches for target in adapter.true_boxes(batch) or []]
    truth = [make_boxes(one["boxes"], one["labels"], torch.ones(len(one["labels"]))) for one in targets]
    return average_precision(truth, join_boxes(outputs))["mAP"]
