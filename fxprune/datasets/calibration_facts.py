"""Looks at calibration batches for what makes scores meaningless: images without content, targets without boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Adapter, Batch
from fxprune.runtime.json_text import first_few
from fxprune.runtime.torch_internals import tree_leaves

LEAST_BOX_SCORE = 0.1
"""Score of the surest box in all images, below which a model looks untrained."""
LEAST_CLASS_CONFIDENCE = 0.05
"""Mean confidence, 0 at chance and 1 at certainty, below which a classifier looks untrained."""
JUDGED_IMAGES = 16
"""Least number of images from which on one and the same class for all of them is worth a warning."""
SUSPICIOUS_BOXES = 50
"""Least number of boxes that is suspicious if every image has exactly as many: an untrained model fills its limit."""
RANGE_TOLERANCE = 0.25
"""How far images may leave [0, 1] without a warning: enlarging overshoots a little."""


@dataclass(frozen=True)
class BatchFacts:
    """What is known of a calibration batch.

    Attributes
    ----------
    index, images : int
        Number of the batch, and of its images.
    own_targets : bool
        Whether its targets are the model's own outputs.
    confidence : float or None
        See `Batch`.
    boxes : tuple of int or None
        Number of boxes of each image; None if its targets are no boxes.
    classes : frozenset of int
        The classes among its targets, of a classifier.
    low, high : float
        Least and largest value of its images; 0 and 1 if they are not known.
    plain : bool
        Whether every image is one plain colour.
    """

    index: int
    images: int
    own_targets: bool
    confidence: float | None = None
    boxes: tuple[int, ...] | None = None
    classes: frozenset[int] = frozenset()
    low: float = 0.0
    high: float = 1.0
    plain: bool = False


def watch(batches: Iterable[Batch | None], adapted: AdaptedModel, facts: list[BatchFacts]) -> Iterator[Batch | None]:
    """Yield batches unchanged, and append the facts of each one to a list. None is the batch of another process."""
    for index, batch in enumerate(batches):
        if batch is not None:
            facts.append(look_at(index, batch, adapted.adapter))
        yield batch


def look_at(index: int, batch: Batch, adapter: Adapter) -> BatchFacts:
    """Return the facts of a batch."""
    rows, classes = adapter.true_boxes(batch), adapter.true_classes(batch)
    ranges = [(image.amin((-2, -1)), image.amax((-2, -1))) for image in _image_tensors(batch.images)]
    return BatchFacts(
        index,
        batch.count,
        batch.own_targets,
        batch.confidence,
        None if rows is None else tuple(len(row["labels"]) for row in rows),
        frozenset() if classes is None else frozenset(classes.tolist()),
        min((float(low.min()) for low, _ in ranges), default=0.0),
        max((float(high.max()) for _, high in ranges), default=1.0),
        bool(ranges) and all(bool((low == high).all()) for low, high in ranges),
    )


def _image_tensors(images: Any) -> list[Tensor]:
    """Return the images of a batch: (N, C, H, W) or several (C, H, W). Of unknown forms, the first (N, C, H, W)."""
    leaves = [leaf for leaf in tree_leaves(images) if isinstance(leaf, Tensor) and leaf.ndim in (3, 4) and leaf.numel()]
    if isinstance(images, list) and all(leaf.ndim == 3 for leaf in leaves):
        return leaves
    return [leaf for leaf in leaves if leaf.ndim == 4][:1]


def count_boxes(facts: Sequence[BatchFacts]) -> dict[str, int]:
    """Return the plan settings on boxes: ``boxes``, their number, and ``images_with_boxes``; empty without boxes."""
    counts = [count for one in facts for count in one.boxes or ()]
    known = any(one.boxes is not None for one in facts)
    return {"boxes": sum(counts), "images_with_boxes": sum(map(bool, counts))} if known else {}


def describe_nonsense(facts: Sequence[BatchFacts], unit_images: bool) -> list[str]:
    """Say in words what makes scores on these batches meaningless, and the way out; empty if nothing does.

    Parameters
    ----------
    facts : sequence of BatchFacts
        Facts of all batches.
    unit_images : bool
        Whether the model needs float images in [0, 1].

    Examples
    --------
    >>> describe_nonsense([BatchFacts(0, 2, False, boxes=(1, 3))], unit_images=True)
    []
    >>> describe_nonsense([BatchFacts(0, 2, False, boxes=(1, 3), high=255.0)], unit_images=True)  # doctest: +ELLIPSIS
    ['the images have values from 0 to 255, but this model needs floats in [0, 1] ...
    """
    own = [one for one in facts if one.own_targets and not one.plain]
    found = [_describe_range(facts) if unit_images else "", _describe_plain(facts), _describe_classes(own)]
    found.append(_describe_boxes(own) or _describe_empty_labels(facts))
    return [text for text in found if text]


def _describe_range(facts: Sequence[BatchFacts]) -> str:
    low, high = min(one.low for one in facts), max(one.high for one in facts)
    if low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
        return ""
    return (
        f"the images have values from {low:.3g} to {high:.3g}, but this model needs floats in [0, 1] or 8-bit integers:"
        " divide pixels by 255, and do not normalize them before"
    )


def _describe_plain(facts: Sequence[BatchFacts]) -> str:
    plain = [str(one.index) for one in facts if one.plain]
    if not plain:
        return ""
    which = f"all images of batch{'es' * (len(plain) > 1)} {first_few(plain)}"
    return f"{which} are one plain colour, black for example: scores on them mean nothing; give real images"


def _describe_classes(own: Sequence[BatchFacts]) -> str:
    """Describe classes that a model gave itself as targets."""
    judged = [one for one in own if one.boxes is None and one.confidence is not None]
    images = sum(one.images for one in judged)
    if not images:
        return ""
    way_out = "Without labels, its own outputs are the targets: load trained weights, or give labels"
    sure = sum(one.images * (one.confidence or 0.0) for one in judged) / images
    if sure < LEAST_CLASS_CONFIDENCE:
        return (
            f"the classifier looks untrained: its classes for {_count(images)} are little better than chance. {way_out}"
        )
    if images >= JUDGED_IMAGES and len(frozenset().union(*(one.classes for one in judged))) == 1:
        return (
            f"the classifier gives all {images} images the same class: it looks untrained, or they are all alike."
            f" {way_out}, or images of all classes"
        )
    return ""


def _describe_boxes(own: Sequence[BatchFacts]) -> str:
    """Describe boxes that a model gave itself as targets."""
    counts = [count for one in own for count in one.boxes or ()]
    if not counts:
        return ""
    images, filled = len(counts), sum(map(bool, counts))
    best = max((one.confidence for one in own if one.confidence is not None), default=1.0)
    way_out = "Without labels, its own boxes are the targets: load trained weights, or give labels"
    if not filled or best < LEAST_BOX_SCORE:
        score = f": the score of the surest box is {best:.2g}" if filled else ""
        return (
            f"the model finds next to nothing in {_count(images)}{score}. It looks untrained, or the images are unlike"
            f" those of its training. {way_out}"
        )
    if images > 1 and len({*counts}) == 1 and counts[0] >= SUSPICIOUS_BOXES:
        return f"the model looks untrained: it finds exactly {counts[0]} boxes in each of {images} images. {way_out}"
    if 2 * filled < images:
        return (
            f"the model finds boxes in {filled} of {images} images only. Without labels, its own boxes are the targets:"
            " give images with objects that it knows, or labels"
        )
    return ""


def _describe_empty_labels(facts: Sequence[BatchFacts]) -> str:
    counts = [count for one in facts if not one.own_targets for count in one.boxes or ()]
    if not counts or any(counts):
        return ""
    return f"the labels of {_count(len(counts))} have no box; give images with boxes, or leave the labels out"


def _count(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"
