"""`torch.fx` records the module calls of a trace as `fxprune.runtime.torch_internals` relies on."""

from __future__ import annotations

from torch import Tensor, fx, nn

from fxprune.runtime import torch_internals as internals


def test_traced_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.block[0](self.block(self.block(x)))

    class Deep(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Conv2d)

    calls = [internals.traced_calls(node) for node in Deep().trace(Twice()).nodes if node.op == "call_module"]
    paths = [[path for _, path in found] for found in calls]
    assert paths == [["block", "block.0"], ["block", "block.0"], ["block.0"]]
    assert calls[0][0][0] != calls[1][0][0]
