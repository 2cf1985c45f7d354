"""FLOPs of a call by torch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops_of(network: nn.Module, images: Any) -> int:
    torch.backends.mha.set_fastpath_enabled(False)  # torch's counter does not know the fused kernel
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return int(counter.get_total_flops())
