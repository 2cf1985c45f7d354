"""Several processes as one: they share out the work, add up what each has found, and fail together.

Whatever decides what comes next is the same on all of them to the last bit, or it is the first one's: processes that
went different ways would wait for each other for good.
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
    """This process's number and how many there are; ``(0, 1)`` where no process group was set up.

    Examples
    --------
    >>> rank_and_world()
    (0, 1)
    """
    ready = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)


def belongs_to_rank(index: int) -> bool:
    """Whether an item of a sequence that all processes go through is this one's to work on."""
    rank, world = rank_and_world()
    return index % world == rank


def take_shard(items: Sequence[Value]) -> list[Value]:
    """The items of a sequence that all processes hold that are this one's to work on."""
    return [item for index, item in enumerate(items) if belongs_to_rank(index)]


def gather_shards(own: Sequence[Value], count: int) -> list[Value]:
    """All items of a sequence of which every process has its `take_shard`."""
    shares = all_gather(list(own))
    return [shares[index % len(shares)][index // len(shares)] for index in range(count)]


def check_enough_batches(batches: int) -> None:
    """Raise `BatchError` unless there is a batch for every process."""
    world = rank_and_world()[1]
    if batches < world:
        raise BatchError(f"{batches} batches cannot be shared by {world} processes; give more, or start fewer")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one until the end of a block: NCCL sends what is no tensor from there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all processes; in float64 if it is a sum already, so that their number does not matter."""
    if rank_and_world()[1] > 1:
        total = _to_backend(value.clone())
        distributed.all_reduce(total)
        value = total.to(value.device)
    return value


def all_reduce_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes; one that has none there adds nothing."""
    if rank_and_world()[1] == 1:
        return
    own = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    flat = all_reduce_sum(torch.cat([part.flatten() for part in own]))
    for weight, part in zip(weights, torch.split(flat, [weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)


def all_gather(value: Any) -> list[Any]:
    """What every process has, in the order of their numbers; anything that can be pickled."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, value)
    return found


def equal_on_all_ranks(measure: Callable[[], float]) -> bool:
    """Whether all processes measure about the same number; where there is one only, it does not measure."""
    if rank_and_world()[1] == 1:
        return True
    numbers = all_gather(measure())
    return all(math.isclose(number, numbers[0], rel_tol=1e-6) or number != number for number in numbers)


def broadcast_tensors(values: Sequence[Tensor]) -> None:
    """Give tensors the first process's values, on all of them."""
    for value in values if rank_and_world()[1] > 1 else ():
        sent = _to_backend(value.detach())
        distributed.broadcast(sent, src=0)
        value.detach().copy_(sent)


def run_on_rank_zero(make: Callable[[], Value]) -> Value:
    """What the first process makes, on all of them; the others wait, and do nothing meanwhile that could disturb it."""
    rank, world = rank_and_world()
    if world == 1:
        return make()
    with raise_on_all_ranks() as meet:
        meet()  # all have come
        found: list[Any] = [make() if rank == 0 else None]
    distributed.broadcast_object_list(found, src=0)
    result: Value = found[0]
    return result


@contextmanager
def raise_on_all_ranks() -> Iterator[Callable[[], None]]:
    """Let what one process raises in a block be raised by all, at the end of it.

    What is yielded is to be called by all alike before they exchange anything within the block: there those that are
    still well learn what befell another. Interruptions are not passed on.
    """
    try:
        yield _exchange_errors
    except Exception as error:
        if SHARED_ERROR_ATTRIBUTE not in vars(error):
            _exchange_errors(error)
        raise
    _exchange_errors()


SHARED_ERROR_ATTRIBUTE = "fxprune_told"
"""Attribute of an error that all processes know of."""


def _exchange_errors(own: Exception | None = None) -> None:
    """Wait for the others, and raise if one of them, or this one, has failed."""
    reports = all_gather(None if own is None else _portable_error(own))
    for rank, report in enumerate(reports):
        if report is not None:
            kind, text = report
            error = own or kind(f"process {rank}: {text}")
            vars(error)[SHARED_ERROR_ATTRIBUTE] = True
            raise error


def _portable_error(error: Exception) -> tuple[type[FxpruneError], str]:
    """An error in a form that can be sent."""
    if isinstance(error, FxpruneError):
        return type(error), str(error)
    return FxpruneError, f"{type(error).__name__}: {error}"


def _to_backend(value: Tensor) -> Tensor:
    """A tensor as the processes' backend takes it: NCCL wants it on the GPU, all want it contiguous."""
    names = str(distributed.get_backend())
    return (value.cuda() if "nccl" in names and "cpu:" not in names else value).contiguous()
