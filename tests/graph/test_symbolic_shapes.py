"""Shapes and strides that hold for all batch and image sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.graph.symbolic_shapes import propagate_symbolic, tensor_specs
from fxprune.runtime.torch_internals import current_size


class Pooled(nn.Module):
    """Sizes that become long formulas: two poolings with rounding, and a convolution with a stride."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        return x


def final_strides(model: nn.Module, batch: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The strides by symbols of the last value, and those of a real run."""
    gm = fx.symbolic_trace(model)
    shapes = propagate_symbolic(gm, tensor_specs((batch,)), {})
    assert not shapes.failure
    last = [node for node in gm.graph.nodes if node.op != "output"][-1].name
    return tuple(current_size(stride) for stride in shapes.values[last].stride()), gm(batch).stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_short_size_formulas_keep_the_order_of_the_dimensions(layout: torch.memory_format) -> None:
    symbolic, real = final_strides(Pooled(), torch.rand(2, 4, 41, 35).to(memory_format=layout))
    assert symbolic == real


def test_strides_of_the_inputs_are_those_of_the_observed_call() -> None:
    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2) * 2

    symbolic, real = final_strides(Flip(), torch.rand(2, 5, 8).transpose(1, 2))
    assert symbolic == real == (40, 8, 1)


def test_part_of_a_larger_value_keeps_its_gaps() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)
            return x[:, 1:3]

    symbolic, real = final_strides(Half(), torch.rand(2, 4, 41, 35))
    assert symbolic == real
