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


def is_own(index: int) -> bool:
    """Whether an item of a sequence that all processes go through is this one's to work on."""
    rank, world = rank_and_world()
    return index % world == rank


def own_share(items: Sequence[Value]) -> list[Value]:
    """The items of a sequence that all processes hold that are this one's to work on."""
    return [item for index, item in enumerate(items) if is_own(index)]


def dealt_out(own: Sequence[Value], count: int) -> list[Value]:
    """All items of a sequence of which every process has its `own_share`."""
    shares = gathered(list(own))
    return [shares[index % len(shares)][index // len(shares)] for index in range(count)]


def check_shareable(batches: int) -> None:
    """Raise `BatchError` unless there is a batch for every process."""
    world = rank_and_world()[1]
    if batches < world:
        raise BatchError(f"{batches} batches cannot be shared by {world} processes; give more, or start fewer")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one until the end of a block: NCCL sends what is no tensor from there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def summed(value: Tensor) -> Tensor:
    """Sum a tensor over all processes; in float64 if it is a sum already, so that their number does not matter."""
    if rank_and_world()[1] > 1:
        total = _sendable(value.clone())
        distributed.all_reduce(total)
        value = total.to(value.device)
    return value


def share_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes; one that has none there adds nothing."""
    if rank_and_world()[1] == 1:
        return
    own = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    flat = summed(torch.cat([part.flatten() for part in own]))
    for weight, part in zip(weights, torch.split(flat, [weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)


def gathered(value: Any) -> list[Any]:
    """What every process has, in the order of their numbers; anything that can be pickled."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, value)
    return found


def alike(measure: Callable[[], float]) -> bool:
    """Whether all processes measure about the same number; where there is one only, it does not measure."""
    if rank_and_world()[1] == 1:
        return True
    numbers = gathered(measure())
    return all(math.isclose(number, numbers[0], rel_tol=1e-6) or number != number for number in numbers)


def overwrite_by_first(values: Sequence[Tensor]) -> None:
    """Give tensors the first process's values, on all of them."""
    for value in values if rank_and_world()[1] > 1 else ():
        sent = _sendable(value.detach())
        distributed.broadcast(sent, src=0)
        value.detach().copy_(sent)


def by_first(make: Callable[[], Value]) -> Value:
    """What the first process makes, on all of them; the others wait, and do nothing meanwhile that could disturb it."""
    rank, world = rank_and_world()
    if world == 1:
        return make()
    with failing_together() as meet:
        meet()  # all have come
        found: list[Any] = [make() if rank == 0 else None]
    distributed.broadcast_object_list(found, src=0)
    result: Value = found[0]
    return result


@contextmanager
def failing_together() -> Iterator[Callable[[], None]]:
    """Let what one process raises in a block be raised by all, at the end of it.

    What is yielded is to be called by all alike before they exchange anything within the block: there those that are
    still well learn what befell another. Interruptions are not passed on.
    """
    try:
        yield _meet
    except Exception as error:
        if TOLD not in vars(error):
            _meet(error)
        raise
    _meet()


TOLD = "fxprune_told"
"""Attribute of an error that all processes know of."""


def _meet(own: Exception | None = None) -> None:
    """Wait for the others, and raise if one of them, or this one, has failed."""
    reports = gathered(None if own is None else _report(own))
    for rank, report in enumerate(reports):
        if report is not None:
            kind, text = report
            error = own or kind(f"process {rank}: {text}")
            vars(error)[TOLD] = True
            raise error


def _report(error: Exception) -> tuple[type[FxpruneError], str]:
    """An error in a form that can be sent."""
    if isinstance(error, FxpruneError):
        return type(error), str(error)
    return FxpruneError, f"{type(error).__name__}: {error}"


def _sendable(value: Tensor) -> Tensor:
    """A tensor as the processes' backend takes it: NCCL wants it on the GPU, all want it contiguous."""
    names = str(distributed.get_backend())
    return (value.cuda() if "nccl" in names and "cpu:" not in names else value).contiguous()
