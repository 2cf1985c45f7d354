"""One pass over the calibration batches: read once, normalized once, labelled if need be."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.detectors.batch import Adapter, Batch, device_of
from fxprune.errors import BatchError, FxpruneError, LossError
from fxprune.graph import map_tensors
from fxprune.ranks import alike, check_shareable, failing_together, gathered, is_own, rank_and_world


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
            if is_own(index):
                yield index, raw if self._kept is not None else self._labelled(model, adapter, raw, index)
        check_shareable(self.count)

    def keep(self, model: nn.Module, adapter: Adapter) -> None:
        """Read everything now, labelled by this model if need be; it can be gone through again then, or in parts.

        Once is enough.
        """
        if self._kept is not None:
            return
        read: dict[int, Batch] = {}
        own: dict[int, Any] = {}
        with failing_together():
            for index, raw in enumerate(chain([self.first_raw], self._rest)):
                mine = is_own(index)
                read[index] = (self._labelled if mine or not index else normalized)(model, adapter, raw, index)
                if mine:
                    own[index] = map_tensors(read[index].targets, Tensor.cpu)
        self.count = len(read)
        self.settle()
        labelled: dict[int, Any] = {index: targets for part in gathered(own) for index, targets in part.items()}
        to = device_of(model)
        self._kept = [
            batch if is_own(index) else replace(batch, targets=map_tensors(labelled[index], lambda value: value.to(to)))
            for index, batch in read.items()
        ]

    def settle(self) -> None:
        """Learn of the other processes where the targets of their batches came from.

        Raises
        ------
        BatchError
            If they read more batches, or fewer.
        """
        self._with_labels = set().union(*gathered(self._with_labels))
        counts = gathered(self.count)
        if len({*counts}) > 1:
            raise BatchError(f"the processes read {', '.join(map(str, counts))} batches; {SAME_LOADER}")

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
            batch = normalized(model, adapter, raw, index)
            yield Batch(batch.images, None, batch.count)

    def first(self, model: nn.Module, adapter: Adapter) -> Batch:
        """Return the first batch, which `own` gives again; read, and labelled if need be, when first asked for."""
        if self._first is None:
            self._first = self._read(model, adapter, self.first_raw, 0)
        return self._first

    def _labelled(self, model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
        return self._read(model, adapter, raw, index) if index else self.first(model, adapter)

    def _read(self, model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
        batch, labelled = read_batch(model, adapter, raw, index)
        self._with_labels.add(labelled)
        return batch


_END = object()
SAME_LOADER = "give all the same loader in the same order, one that does not share out images by itself"


def check_same(batches: Iterable[Batch]) -> None:
    """Raise `BatchError` unless all processes hold the same batches."""
    leaves = [leaf for batch in batches for leaf in tree_leaves(batch.images) if isinstance(leaf, Tensor)]
    if not alike(lambda: sum(float(leaf.double().sum()) for leaf in leaves)):
        raise BatchError(f"the processes hold different batches; {SAME_LOADER}")


def read_batch(model: nn.Module, adapter: Adapter, raw: Any, index: int) -> tuple[Batch, bool]:
    """Normalize one batch, label it if need be, and say whether it came with labels; errors name its index."""
    batch = normalized(model, adapter, raw, index)
    with _named(index):
        return (batch, True) if batch.targets is not None else (adapter.label(model, batch), False)


def normalized(model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
    """Bring one batch into the form the adapter works on; errors name its index."""
    with _named(index):
        if raw is None:
            raise BatchError(f"got None; known forms: {adapter.forms}")
        return adapter.normalize(model, map_tensors(raw, _ordinary))


def _ordinary(value: Tensor) -> Tensor:
    """Copy a tensor that was made in inference mode: gradients cannot pass through those."""
    return value.clone() if value.is_inference() else value


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Put the batch's index before the message of an error about it."""
    try:
        yield
    except FxpruneError as error:
        raise type(error)(f"batch {index}: {error}") from error.__cause__


def take_loss(model: nn.Module, adapter: Adapter, batch: Batch, index: int, seed: int) -> Tensor:
    """Compute a batch's loss, samplers seeded, and hold it to what a loss must be.

    Returns
    -------
    Tensor
        Its parts, finite, of shape (P,): they sum to the loss.

    Raises
    ------
    LossError
        If it is not finite; names the batch.
    BatchError
        If the model refuses the batch; names it, the reason, and the forms that are known.
    """
    torch.manual_seed(seed)
    try:
        with _named(index):
            value = adapter.loss(model, batch)
    except FxpruneError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        text = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise BatchError(
            f"batch {index}: the {adapter.family} could not take its loss: {type(error).__name__}: {text.rstrip('.')}."
            f" {_label_range(batch)}Known forms: {adapter.forms}"
        ) from error
    total = float(value.detach().sum())
    if not math.isfinite(total):
        raise LossError(f"batch {index}: the loss is {total}; leave that batch out or mend its labels")
    return value.reshape(-1)


def _label_range(batch: Batch) -> str:
    """Say which labels a batch holds: out-of-range labels are the usual cause of a refusal."""
    rows = batch.targets if isinstance(batch.targets, list) else []
    labels = [row["labels"] for row in rows if isinstance(row, dict) and isinstance(row.get("labels"), Tensor)]
    joined = torch.cat([label.reshape(-1) for label in labels]) if labels else torch.empty(0)
    return f"Its labels run from {int(joined.min())} to {int(joined.max())}. " if len(joined) else ""
