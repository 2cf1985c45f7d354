"""One pass over the calibration batches: read once, normalized once, labelled if need be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.adapters.calls import normalize_and_label, normalize_batch
from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.errors import BatchError
from fxprune.graph.fx_utils import map_tensors
from fxprune.runtime.distributed import (
    all_gather,
    belongs_to_rank,
    check_enough_batches,
    equal_on_all_ranks,
    raise_on_all_ranks,
    rank_and_world,
)


class Calibration:
    """The batches of a loader in the form the model's adapter takes.

    Parameters
    ----------
    loader : iterable
        Any iterable of batches; a generator is read once. Several processes are all given the same.

    Attributes
    ----------
    first_raw
        The first batch as it was given.
    count : int
        Batches of the loader, those of other processes too, that `own` has come by.
    """

    @classmethod
    def of(cls, loader: Any) -> Calibration:
        """A loader's calibration; one that was made already as it is."""
        return loader if isinstance(loader, cls) else cls(loader)

    def __init__(self, loader: Any) -> None:
        if isinstance(loader, (str, bytes, Tensor, dict)) or not isinstance(loader, Iterable):
            raise BatchError(
                f"calib_loader must be an iterable of batches, got {type(loader).__name__};"
                " a single batch goes in a list"
            )
        self._rest = iter(loader)
        first = next(self._rest, _END)
        if first is _END:
            raise BatchError("calib_loader yielded no batch; give at least one")
        self.first_raw: Any = first
        self._first: Batch | None = None
        self._kept: list[Batch] | None = None
        self._with_labels: set[bool] = set()
        self.count = 0

    def __iter__(self) -> Iterator[Batch]:
        """The batches that `keep` has read."""
        return iter(self._kept or ())

    @property
    def targets(self) -> str:
        """Where the targets of the batches read so far came from, in words."""
        if all(self._with_labels):
            return "labels given"
        own = "the model's own confident outputs"
        return f"labels given for some batches, {own} for the rest" if any(self._with_labels) else own

    def own(self, model: nn.Module, adapter: Adapter) -> Iterator[tuple[int, Batch]]:
        """Yield this process's share of the batches, each once and with its number among all.

        Batches without labels get the model's own confident outputs.

        Raises
        ------
        BatchError
            At the end, if there were fewer batches than processes.
        """
        self.count = 0
        for index, raw in enumerate(chain([self.first_raw], self._rest) if self._kept is None else self._kept):
            self.count += 1
            if belongs_to_rank(index):
                yield index, raw if self._kept is not None else self._labelled(model, adapter, raw, index)
        check_enough_batches(self.count)

    def keep(self, model: nn.Module, adapter: Adapter) -> None:
        """Read everything now, labelled by this model if need be; it can be gone through again then, or in parts.

        Once is enough.
        """
        if self._kept is not None:
            return
        read: dict[int, Batch] = {}
        own: dict[int, Any] = {}
        with raise_on_all_ranks():
            for index, raw in enumerate(chain([self.first_raw], self._rest)):
                mine = belongs_to_rank(index)
                read[index] = (self._labelled if mine or not index else normalize_batch)(model, adapter, raw, index)
                if mine:
                    own[index] = map_tensors(read[index].targets, Tensor.cpu)
        self.count = len(read)
        self.settle()
        labelled: dict[int, Any] = {index: targets for part in all_gather(own) for index, targets in part.items()}
        to = device_of(model)
        self._kept = [
            batch
            if belongs_to_rank(index)
            else replace(batch, targets=map_tensors(labelled[index], lambda value: value.to(to)))
            for index, batch in read.items()
        ]

    def settle(self) -> None:
        """Learn of the other processes where the targets of their batches came from.

        Raises
        ------
        BatchError
            If they read more batches, or fewer.
        """
        self._with_labels = set().union(*all_gather(self._with_labels))
        counts = all_gather(self.count)
        if len({*counts}) > 1:
            raise BatchError(f"the processes read {', '.join(map(str, counts))} batches; {SAME_LOADER_HINT}")

    def apart(self, images: int, others: int) -> tuple[Calibration, Calibration]:
        """Two samples of the batches kept, no batch in both: as many as hold so many images, half of all at most, and
        of the rest as many as hold so many others.

        Both of all batches where these are too few for every process to have some in each.
        """
        kept, world = self._kept or [], rank_and_world()[1]
        if len(kept) < 2 * world:
            return self._some(kept, images), self._some(kept, others)
        one = self._some(kept[::2], images)
        return one, self._some([batch for batch in kept if all(batch is not own for own in one)], others)

    def _some(self, batches: Sequence[Batch], images: int) -> Calibration:
        part, found = copy.copy(self), 0
        part._kept = []
        for batch in batches:
            if found < images or len(part._kept) < rank_and_world()[1]:
                part._kept.append(batch)
                found += batch.count
        return part

    def images(self, model: nn.Module, adapter: Adapter) -> Iterator[Batch]:
        """Yield every batch once, in the form the adapter runs; labels are left out and none are made."""
        if self._kept is not None:
            yield from (Batch(batch.images, None, batch.count) for batch in self._kept)
            return
        for index, raw in enumerate(chain([self.first_raw], self._rest)):
            batch = normalize_batch(model, adapter, raw, index)
            yield Batch(batch.images, None, batch.count)

    def first(self, model: nn.Module, adapter: Adapter) -> Batch:
        """Return the first batch, which `own` gives again; read, and labelled if need be, when first asked for."""
        if self._first is None:
            self._first = self._read(model, adapter, self.first_raw, 0)
        return self._first

    def _labelled(self, model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
        return self._read(model, adapter, raw, index) if index else self.first(model, adapter)

    def _read(self, model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
        batch, labelled = normalize_and_label(model, adapter, raw, index)
        self._with_labels.add(labelled)
        return batch


_END = object()
SAME_LOADER_HINT = "give all the same loader in the same order, one that does not share out images by itself"


def check_same_batches(batches: Iterable[Batch]) -> None:
    """Raise `BatchError` unless all processes hold the same batches."""
    leaves = [leaf for batch in batches for leaf in tree_leaves(batch.images) if isinstance(leaf, Tensor)]
    if not equal_on_all_ranks(lambda: sum(float(leaf.double().sum()) for leaf in leaves)):
        raise BatchError(f"the processes hold different batches; {SAME_LOADER_HINT}")
