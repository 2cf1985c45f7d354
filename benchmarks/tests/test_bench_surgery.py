"""bench_surgery counts what changed, and says whether a pickle needs fxprune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from benchmarks.bench_surgery import describe_change, kept_bytes, loads_without_fxprune, render_table
from tests.helpers.models import labelled, tiny


class Branch(nn.Module):
    """Its forward changes if the convolution goes: there are functions around it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv, self.leave = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.sigmoid(self.conv(torch.tanh(self.enter(x)))))


def pruned_without(model: nn.Module, name: str) -> tuple[nn.Module, Any]:
    analysis = fxprune.analyze(model, labelled(), criterion=lambda region, _: float(region.name != name))
    plan = analysis.plan(0.01)
    assert [region.name for region in plan.removed] == [name]
    return fxprune.apply(model, plan), plan


def test_an_identity_is_in_place_and_loads_without_fxprune() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    pruned, plan = pruned_without(model.eval(), "1")
    row = describe_change(model, pruned, plan)
    assert (row["cuts"], row["in_place"], row["changed_class"], row["graphs"]) == (1, 1, 0, [])
    assert loads_without_fxprune(pruned)


def test_a_graph_is_not_in_place_and_needs_fxprune() -> None:
    model = tiny()
    model.blocks.append(Branch())  # type: ignore[operator,union-attr]
    name = f"blocks.{len(model.blocks) - 1}"  # type: ignore[arg-type]
    pruned, plan = pruned_without(model, f"{name}.conv")
    row = describe_change(model, pruned, plan)
    assert (row["cuts"], row["in_place"], row["changed_class"], row["graphs"]) == (1, 0, 1, [name])
    assert not loads_without_fxprune(pruned)


def test_kept_memory_is_that_of_activations() -> None:
    layer, image = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.rand(2, 4)
    assert kept_bytes(layer, image) == 2 * 4 * 4 * 2  # the input of the first layer and that of the second


@pytest.mark.parametrize("timed", [False, True])
def test_table_has_columns_of_timings_if_there_are_any(timed: bool) -> None:
    row: dict[str, Any] = {"system": "net", "budget": 0.1, "cuts": 2, "in_place": 1, "modules": 9, "changed_class": 1,
                           "loads_without_fxprune": False}  # fmt: skip
    if timed:
        row |= {f"{name}{end}": 1.0 for name in ("ratio", "floor") for end in ("", "_low", "_high")} | {
            "kept_memory": 1.0
        }
    head, _, cells = render_table([row, {"system": "other", "error": "no"}])
    assert head.count("|") == cells.count("|") == (11 if timed else 8)
    assert cells.startswith("| net | 10% | 2 | 1 | 9 | 1 | no |")
