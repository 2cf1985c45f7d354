"""Fine-tuning with labels, the same for versions pruned by fxprune and by other tools."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxprune.adapters.calls import batch_loss, normalize_and_label
from fxprune.adapters.registry import choose_adapter
from fxprune.runtime.private_copy import private_copy


class FineTuning:
    """Trains a copy of a model by its own loss; batch norms keep their statistics.

    Attributes
    ----------
    model : Module
        The copy.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], learning_rate: float, seed: int) -> None:
        self.model = private_copy(model, keep_precision=True)
        self.batches, self.learning_rate, self.seed = batches, learning_rate, seed
        self.adapter = choose_adapter(self.model, batches[0], None)
        self.adapter.prepare(self.model)
        self.weights = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=1e-4)

    def step(self, index: int, number: int, lr_scale: float = 1.0) -> None:
        """Take one optimizer step on batch `index`.

        Parameters
        ----------
        number : int
            Number of the step, which seeds the loss.
        lr_scale : float
            The learning rate as a fraction of the full one.
        """
        batch = normalize_and_label(self.model, self.adapter, self.batches[index], index)
        loss = batch_loss(self.model, self.adapter, batch, index, seed=self.seed + number).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, 10.0)
        self.optimizer.param_groups[0]["lr"] = lr_scale * self.learning_rate
        self.optimizer.step()


def finetune(model: nn.Module, batches: Sequence[Any], learning_rate: float, seed: int = 0) -> tuple[nn.Module, float]:
    """Train a copy of a model for one epoch.

    Returns
    -------
    model : Module
        The copy, in eval mode.
    seconds : float
        Wall time of the training.
    """
    tuning = FineTuning(model, batches, learning_rate, seed)
    started = time.perf_counter()
    for index in range(len(batches)):
        tuning.step(index, index)
    return tuning.model.eval(), time.perf_counter() - started


def finetune_for(
    seconds: float,
    model: nn.Module,
    batches: Sequence[Any],
    learning_rate: float,
    looks: int = 4,
    seed: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> Iterator[nn.Module]:
    """Train a copy for so many seconds of processor time, on batches in random order.

    The learning rate falls linearly to 0.

    Parameters
    ----------
    looks : int
        Equal parts of the time, after each of which the copy is given out.
    clock : callable
        Gives the time in seconds.

    Yields
    ------
    Module
        The copy in eval mode.
    """
    tuning = FineTuning(model, batches, learning_rate, seed)
    random = torch.Generator().manual_seed(seed)
    spent, number, order = 0.0, 0, list[int]()
    for look in range(1, looks + 1):
        while spent < seconds * look / looks:
            started = clock()
            order = order or torch.randperm(len(batches), generator=random).tolist()
            tuning.step(order.pop(), number, lr_scale=1 - spent / seconds)
            number += 1
            spent += clock() - started
        yield tuning.model.eval()
