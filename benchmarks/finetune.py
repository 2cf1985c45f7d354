"""The short fine-tuning that every pruned version gets, whatever pruned it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxprune.calibration import read_batch, take_loss
from fxprune.detectors.choice import choose_adapter
from fxprune.isolation import private_copy


def finetune(model: nn.Module, batches: Sequence[Any], learning_rate: float, seed: int = 0) -> tuple[nn.Module, float]:
    """Train a copy for one epoch by the adapter's own loss; norms keep their statistics.

    Returns
    -------
    model : Module
        The copy, in eval mode.
    seconds : float
        That it took.
    """
    twin = private_copy(model, keep_precision=True)
    adapter = choose_adapter(twin, batches[0], None)
    adapter.prepare(twin)
    weights = [value for value in twin.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=1e-4)
    started = time.perf_counter()
    for index in range(len(batches)):
        batch, _ = read_batch(twin, adapter, batches[index], index)
        loss = take_loss(twin, adapter, batch, index, seed=seed + index).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
    return twin.eval(), time.perf_counter() - started
