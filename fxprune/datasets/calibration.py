"""Reads calibration batches once from a loader, and keeps them in memory if they are needed again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from torch import Tensor, nn

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.custom_loss import Loss
from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.adapters.registry import choose_adapter, unwrap
from fxprune.errors import BatchError
from fxprune.graph.fx_utils import map_tensors
from fxprune.runtime.distributed import (
    all_gather,
    belongs_to_rank,
    check_enough_batches,
    equal_on_all_ranks,
    raise_on_all_ranks,
    world_size,
)
from fxprune.runtime.torch_internals import tree_leaves

HOLD_OUT_EVERY, LEAST_HELD_OUT = 8, 16
"""One of this many batches is held out to measure on, if these have at least so many images."""
_END = object()
SAME_LOADER_HINT = "give all the same loader in the same order, without a DistributedSampler"


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration batches that are kept in memory.

    Attributes
    ----------
    batches : tuple of Batch
        All batches of the loader, with targets; the same in all processes.
    adapter : Adapter
        The adapter that read them.
    targets : str
        Source of the targets, in words.

    Examples
    --------
    >>> calibration = open_calibration(model, loader, None).keep()  # doctest: +SKIP
    >>> some, others = calibration.split(64, 192)                  # doctest: +SKIP
    """

    batches: tuple[Batch, ...] = field(repr=False)
    adapter: Adapter
    targets: str

    @classmethod
    def read(cls, adapted: AdaptedModel, first: Batch, rest: Iterable[Any]) -> CalibrationSet:
        """Read the batches of a loader. Batches without labels get the model's own confident outputs as targets.

        Every process labels its share of the batches and receives the targets of the others.

        Parameters
        ----------
        adapted : AdaptedModel
            The model with its adapter.
        first : Batch
            The first batch, read already.
        rest : iterable
            The other batches of the loader.

        Raises
        ------
        BatchError
            If a batch cannot be read, or the processes read different numbers of batches.
        """
        read = {0: first}
        with raise_on_all_ranks():
            for index, raw in enumerate(rest, 1):
                read[index] = (adapted.read if belongs_to_rank(index) else adapted.normalize)(index, raw)
        check_same_count(len(read))
        own = {
            index: (map_tensors(batch.targets, Tensor.cpu), batch.own_targets)
            for index, batch in read.items()
            if belongs_to_rank(index)
        }
        device = device_of(adapted.module)
        for part in all_gather(own):
            for index, (targets, own_targets) in part.items():
                if not belongs_to_rank(index):
                    targets = map_tensors(targets, lambda value: value.to(device))
                    read[index] = replace(read[index], targets=targets, own_targets=own_targets)
        sources = {batch.own_targets for batch in read.values()}
        return cls(tuple(read.values()), adapted.adapter, describe_targets(sources))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def image_batches(self) -> list[Batch]:
        """All batches, without their targets."""
        return [replace(batch, targets=None) for batch in self.batches]

    def labelled_batches(self) -> list[Batch]:
        """Return all batches, with the labels of the loader; see `OpenCalibration.labelled_batches`."""
        return [check_labels(batch, index) for index, batch in enumerate(self.batches)]

    def own_batches(self) -> Iterator[Batch | None]:
        """Yield the batches in order; None is a batch that another process works on."""
        check_enough_batches(len(self.batches))
        for index, batch in enumerate(self.batches):
            yield batch if belongs_to_rank(index) else None

    def split(self, images: int, others: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Draw two samples with no batch in common.

        Parameters
        ----------
        images : int
            Number of images of the first sample, rounded up to whole batches; at most half of all batches are taken.
        others : int
            Number of images of the second sample, from the remaining batches.

        Returns
        -------
        tuple of CalibrationSet
            The two samples. If there are too few batches for every process to get some of each, both samples are drawn
            from all batches and may overlap.
        """
        if len(self.batches) < 2 * world_size():
            return self._take(self.batches, images), self._take(self.batches, others)
        first = self._take(self.batches[::2], images)
        left = [batch for batch in self.batches if all(batch is not taken for taken in first.batches)]
        return first, self._take(left, others)

    def hold_out(self, most: int) -> tuple[CalibrationSet, CalibrationSet | None]:
        """Divide the batches into those for scores and healing, and every eighth to measure on.

        Parameters
        ----------
        most : int
            Number of images from which on no further batch is held out.

        Returns
        -------
        rest, held_out : CalibrationSet
            If less than `LEAST_HELD_OUT` images would be held out, or less batches than processes would be left, `rest`
            has all batches and `held_out` is None.
        """
        held_out = self._take(self.batches[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY], most)
        left = [batch for batch in self.batches if all(batch is not taken for taken in held_out.batches)]
        if sum(batch.count for batch in held_out.batches) < LEAST_HELD_OUT or len(left) < world_size():
            return self, None
        return replace(self, batches=tuple(left)), held_out

    def _take(self, batches: Sequence[Batch], images: int) -> CalibrationSet:
        taken: list[Batch] = []
        for batch in batches:
            if sum(one.count for one in taken) < images or len(taken) < world_size():
                taken.append(batch)
        return replace(self, batches=tuple(taken))


@dataclass(frozen=True)
class OpenCalibration:
    """A copy of a model and its calibration batches. Of a loader, only the first batch is read so far.

    Attributes
    ----------
    adapted : AdaptedModel
        The private copy.
    source : CalibrationSet or iterator
        The kept batches, or the batches of the loader after the first. An iterator can be used only once.
    first_raw
        The first batch of the loader, before it is read; None for a `CalibrationSet`.
    """

    adapted: AdaptedModel
    source: CalibrationSet | Iterator[Any] = field(repr=False)
    first_raw: Any = field(repr=False)

    @cached_property
    def first(self) -> Batch:
        """The first batch, with targets."""
        if isinstance(self.source, CalibrationSet):
            return self.source.batches[0]
        return self.adapted.read(0, self.first_raw)

    def keep(self) -> CalibrationSet:
        """Read all batches now and keep them."""
        if isinstance(self.source, CalibrationSet):
            return self.source
        with raise_on_all_ranks():
            first = self.first
        return CalibrationSet.read(self.adapted, first, self.source)

    def given_batches(self) -> Iterator[Batch]:
        """Read the batches one at a time, with their labels if they have any; no targets are computed."""
        if isinstance(self.source, CalibrationSet):
            yield from self.source
            return
        for index, raw in enumerate(chain([self.first_raw], self.source)):
            yield self.adapted.normalize(index, raw)

    def image_batches(self) -> Iterator[Batch]:
        """Read the batches one at a time, without targets."""
        return (replace(batch, targets=None) for batch in self.given_batches())

    def labelled_batches(self) -> list[Batch]:
        """Read all batches with their labels.

        Raises
        ------
        BatchError
            If a batch has no labels. The message names it.
        """
        if isinstance(self.source, CalibrationSet):
            return self.source.labelled_batches()
        return [check_labels(batch, index) for index, batch in enumerate(self.given_batches())]

    def own_batches(self, adapted: AdaptedModel) -> Iterator[Batch | None]:
        """Yield the batches in order, read one at a time; None is a batch that another process works on.

        Parameters
        ----------
        adapted : AdaptedModel
            The model whose outputs are the targets of batches without labels.

        Raises
        ------
        BatchError
            If a batch cannot be read. At the end, if there were fewer batches than processes.
        """
        if isinstance(self.source, CalibrationSet):
            yield from self.source.own_batches()
            return
        yield self.first if belongs_to_rank(0) else None
        count = 1
        for index, raw in enumerate(self.source, 1):
            count += 1
            yield adapted.read(index, raw) if belongs_to_rank(index) else None
        check_enough_batches(count)


def open_calibration(
    model: nn.Module, loader: Any, loss: Loss | None, seed: int = 0, name: str = "calib_loader"
) -> OpenCalibration:
    """Copy a model, choose its adapter by the first batch of a loader, and prepare the copy.

    Parameters
    ----------
    model : Module
        The caller's model. It is not changed.
    loader : iterable or CalibrationSet
        Batches in a form that the adapter knows. A generator is read once. All processes need the same loader.
    loss : callable, optional
        The caller's own loss, for models without an own adapter.
    seed : int
        Seed of samplers inside the loss.
    name : str
        Name of the loader in messages.

    Raises
    ------
    BatchError
        If the loader is not an iterable of batches, or is empty.
    """
    if isinstance(loader, CalibrationSet):
        return OpenCalibration(AdaptedModel.copy_of(model, loader.adapter, seed), loader, None)
    if isinstance(loader, (str, bytes, Tensor, dict)) or not isinstance(loader, Iterable):
        raise BatchError(
            f"{name} must be an iterable of batches, got {type(loader).__name__}; a single batch goes in a list"
        )
    batches = iter(loader)
    first_raw = next(batches, _END)
    if first_raw is _END:
        read = "; a generator is empty once it was read" if batches is loader else ""
        raise BatchError(f"{name} yielded no batch; give at least one{read}")
    adapter = choose_adapter(unwrap(model), first_raw, loss)
    return OpenCalibration(AdaptedModel.copy_of(model, adapter, seed), batches, first_raw)


def check_labels(batch: Batch, index: int) -> Batch:
    """Return a batch if its targets are the labels of the loader.

    Raises
    ------
    BatchError
        If it has no labels.
    """
    if batch.targets is None or batch.own_targets:
        raise BatchError(
            f"batch {index} has no labels, which heal='mimic_labelled' needs in every batch: give labelled batches, or"
            " heal='mimic', which needs none"
        )
    return batch


def describe_targets(sources: Collection[bool]) -> str:
    """Return the source of the targets in words; True is a batch whose targets are the model's own outputs."""
    own = "the model's own confident outputs"
    if not any(sources):
        return "labels given"
    return own if all(sources) else f"labels given for some batches, {own} for the rest"


def check_same_count(count: int) -> None:
    """Raise `BatchError` if the processes read different numbers of batches."""
    counts = all_gather(count)
    if len({*counts}) > 1:
        raise BatchError(f"the processes read {', '.join(map(str, counts))} batches; {SAME_LOADER_HINT}")


def check_same_batches(batches: Iterable[Batch]) -> None:
    """Raise `BatchError` if the processes have different batches."""
    leaves = [leaf for batch in batches for leaf in tree_leaves(batch.images) if isinstance(leaf, Tensor)]
    if not equal_on_all_ranks(lambda: sum(float(leaf.double().sum()) for leaf in leaves)):
        raise BatchError(f"the processes hold different batches; {SAME_LOADER_HINT}")
