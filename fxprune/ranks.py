"""Several processes as one: what each has summed, added up over all; every one of them then holds the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, distributed

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


def own_share(items: Sequence[Value]) -> list[Value]:
    """Every so many items of a sequence that all processes hold: those that are this one's to work on."""
    rank, world = rank_and_world()
    return list(items[rank::world])


def summed(value: Tensor) -> Tensor:
    """Sum a tensor over all processes; in float64 if it is a sum already, so that their number does not matter."""
    if rank_and_world()[1] > 1:
        value = value.contiguous().clone()
        distributed.all_reduce(value)
    return value


def gathered(value: Any) -> list[Any]:
    """What every process has, in the order of their numbers; anything that can be pickled."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, value)
    return found


def same_everywhere(value: Tensor) -> Tensor:
    """The first process's value, on all of them."""
    if rank_and_world()[1] > 1:
        distributed.broadcast(value, src=0)
    return value
