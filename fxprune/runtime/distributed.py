"""Runs several processes as one: they share the work, sum up their results, and fail together.

A value that decides a branch must be equal on all processes to the last bit, or must come from rank 0. Otherwise the
processes could take different branches and wait for each other forever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from fxprune.errors import BatchError, FxpruneError

Value = TypeVar("Value")


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; ``(0, 1)`` without a process group.

    Examples
    --------
    >>> rank_and_world()
    (0, 1)
    """
    ready = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)


def world_size() -> int:
    """Number of processes; 1 where no process group was set up."""
    return rank_and_world()[1]


def belongs_to_rank(index: int) -> bool:
    """Whether this process works on the item at `index` of a sequence that all processes iterate over."""
    rank, world = rank_and_world()
    return index % world == rank


def take_shard(items: Sequence[Value]) -> list[Value]:
    """Return the items that this process works on, from a sequence that all processes hold."""
    return [item for index, item in enumerate(items) if belongs_to_rank(index)]


def gather_shards(own: Sequence[Value], count: int) -> list[Value]:
    """Return all `count` items of a sequence, of which every process holds its `take_shard`."""
    shares = all_gather(list(own))
    return [shares[index % len(shares)][index // len(shares)] for index in range(count)]


def check_enough_batches(batches: int) -> None:
    """Raise `BatchError` unless there is a batch for every process."""
    world = rank_and_world()[1]
    if batches < world:
        raise BatchError(f"{batches} batches cannot be shared by {world} processes; give more, or start fewer")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device until the end of a block. NCCL sends pickled objects from the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all processes. Pass partial sums in float64: the number of processes then does not matter."""
    if rank_and_world()[1] > 1:
        total = _to_backend(value.clone())
        distributed.all_reduce(total)
        value = total.to(value.device)
    return value


def all_reduce_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes. A weight without a gradient on some process adds nothing there."""
    if rank_and_world()[1] == 1:
        return
    own = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    flat = all_reduce_sum(torch.cat([part.flatten() for part in own]))
    for weight, part in zip(weights, torch.split(flat, [weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)


def all_gather(value: Any) -> list[Any]:
    """Return the value of every process in the order of ranks. It can be any object that can be pickled."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, value)
    return found


def equal_on_all_ranks(measure: Callable[[], float]) -> bool:
    """Whether all processes measure about the same number. A single process does not measure."""
    if rank_and_world()[1] == 1:
        return True
    numbers = all_gather(measure())
    return all(math.isclose(number, numbers[0], rel_tol=1e-6) or number != number for number in numbers)


def broadcast_tensors(values: Sequence[Tensor]) -> None:
    """Copy the tensors of rank 0 to all processes, in place."""
    for value in values if rank_and_world()[1] > 1 else ():
        sent = _to_backend(value.detach())
        distributed.broadcast(sent, src=0)
        value.detach().copy_(sent)


def run_on_rank_zero(make: Callable[[], Value]) -> Value:
    """Call a function on rank 0 only and return its result on all processes. The others wait and cannot disturb it."""
    rank, world = rank_and_world()
    if world == 1:
        return make()
    with raise_on_all_ranks() as meet:
        meet()  # wait for all processes
        found: list[Any] = [make() if rank == 0 else None]
    distributed.broadcast_object_list(found, src=0)
    result: Value = found[0]
    return result


@contextmanager
def raise_on_all_ranks() -> Iterator[Callable[[], None]]:
    """Raise an error of one process in a block on all processes, at the end of the block.

    Interrupts are not passed on.

    Yields
    ------
    callable
        All processes must call it before they exchange anything in the block. It raises the error of a process that
        failed before.
    """
    try:
        yield _exchange_errors
    except Exception as error:
        if SHARED_ERROR_ATTRIBUTE not in vars(error):
            _exchange_errors(error)
        raise
    _exchange_errors()


SHARED_ERROR_ATTRIBUTE = "fxprune_told"
"""Attribute that marks an error as known to all processes."""


def _exchange_errors(own: Exception | None = None) -> None:
    """Wait for the other processes, and raise if one of them or this one has failed."""
    reports = all_gather(None if own is None else _portable_error(own))
    for rank, report in enumerate(reports):
        if report is not None:
            kind, text = report
            error = own or kind(f"process {rank}: {text}")
            vars(error)[SHARED_ERROR_ATTRIBUTE] = True
            raise error


def _portable_error(error: Exception) -> tuple[type[FxpruneError], str]:
    """Convert an error to a class and a message that can be sent."""
    if isinstance(error, FxpruneError):
        return type(error), str(error)
    return FxpruneError, f"{type(error).__name__}: {error}"


def _to_backend(value: Tensor) -> Tensor:
    """Return a tensor in the form that the backend needs: on the GPU for NCCL, and contiguous."""
    names = str(distributed.get_backend())
    return (value.cuda() if "nccl" in names and "cpu:" not in names else value).contiguous()
