"""Pruned models under torch.compile, for the six systems: what works unpruned works pruned, with the outputs of eager.

Dynamo follows the values of a call: a detector that finds no boxes has fewer graphs than one that finds some. Where a
test counts graphs, both models are made to follow the same path. All graphs are counted: Dynamo compiles at most eight
versions of a function by default, and a pruned YOLO has a graph for every block where an unpruned one has a single
``Conv.forward``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo import config
from torch._dynamo.exc import TorchDynamoException, UserError

from tests.helpers.cases import Case
from tests.helpers.comparisons import assert_alike, assert_trained_alike, trained
from tests.helpers.models import pixels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forget_compiled_code")]

CLASSIFIERS = {"resnet50", "mobilenet_v2", "shufflenet_v2_x1_0"}
WHOLE_GRAPH = {"first call": CLASSIFIERS, "later": {*CLASSIFIERS, "yolov8n"}}
"""Systems that are one graph: YOLOv8 reads the numbers of its strides when it meets a new image size."""
DYNAMIC = {*CLASSIFIERS, "yolov8n"}
"""Systems that take two image sizes with ``dynamic=True``: the sizes of torchvision's resizing Dynamo cannot divide."""


def of_sizes(case: Case) -> list[Any]:
    """Two inputs of different sizes, no two sides alike."""
    sides = ((96, 128), (128, 160))
    if case.system.family == "torchvision":
        return [[pixels(3, *side)] for side in sides]
    return [pixels(count, 3, *side) for count, side in zip((2, 3), sides, strict=True)]


# Graphs and breaks ----------------------------------------------------------------------------------------------------


def led(model: nn.Module) -> nn.Module:
    """A copy whose boxes are where they are whatever the network says, so that as many go the same way."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "bbox_pred" in name:
            nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def graphs_and_breaks(model: nn.Module, x: Any) -> tuple[int, int]:
    torch._dynamo.reset()
    with config.patch(recompile_limit=64):
        found = torch._dynamo.explain(model)(x)
    assert found.graph_count > 0
    return found.graph_count, found.graph_break_count


@pytest.mark.parametrize("call", WHOLE_GRAPH)
def test_pruned_system_has_no_more_graphs_and_breaks(case: Case, call: str) -> None:
    counts = []
    for model in map(led, (case.model, case.pruned)):
        if call == "later":
            model(case.x)
        counts.append(graphs_and_breaks(model, case.x))
    (whole_graphs, whole_breaks), (graphs, breaks) = counts
    assert graphs <= whole_graphs
    assert breaks <= whole_breaks
    assert (whole_graphs == 1) == (case.system.name in WHOLE_GRAPH[call])


def takes(run: Callable[[], Any]) -> bool:
    """Whether Dynamo takes something; errors of any other kind are errors."""
    try:
        run()
    except (TorchDynamoException, UserError):
        return False
    return True


@torch.no_grad()
@pytest.mark.parametrize("call", WHOLE_GRAPH)
def test_whole_graph_systems_stay_one_graph(case: Case, call: str) -> None:
    taken = []
    for model in map(copy.deepcopy, (case.model, case.pruned)):
        if call == "later":
            model(case.x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        taken.append(takes(lambda compiled=compiled: compiled(case.x)))  # type: ignore[misc]
    assert taken == [case.system.name in WHOLE_GRAPH[call]] * 2


# Dynamic shapes -------------------------------------------------------------------------------------------------------


def trunk(case: Case, model: nn.Module) -> nn.Module:
    """A copy of what of a model is tensors in, tensors out: it leaves out resizing, anchors and suppression."""
    model = copy.deepcopy(model)
    if case.system.family == "torchvision":
        return model.get_submodule("backbone")
    if case.system.family == "ultralytics":
        model.get_submodule("model")[-1].training = True  # type: ignore[index]
    return model


def count_graphs(model: nn.Module, inputs: list[Any]) -> list[int]:
    """How many graphs Dynamo makes with dynamic shapes, up to each input; holds the outputs to those of eager."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    compiled, counts = torch.compile(model, backend=note, dynamic=True), []
    for x in inputs:
        with config.patch(recompile_limit=64):
            found = compiled(x)
        assert_alike(found, model(x))
        counts.append(len(graphs))
    return counts


@torch.no_grad()
def test_one_graph_serves_two_image_sizes(case: Case) -> None:
    inputs = [x if isinstance(x, Tensor) else x[0][None] for x in of_sizes(case)]
    for model in (case.model, case.pruned):
        assert count_graphs(trunk(case, model), inputs) == [1, 1]


@torch.no_grad()
def test_whole_models_accept_two_image_sizes_as_unpruned(case: Case) -> None:
    counts: list[list[int]] = [[], []]
    for count, model in zip(counts, (case.model, case.pruned), strict=True):
        twin = copy.deepcopy(model)
        taken = takes(lambda twin=twin, count=count: count.extend(count_graphs(twin, of_sizes(case))))  # type: ignore[misc]
        assert taken == (case.system.name in DYNAMIC)
    assert all(graphs <= before for before, graphs in zip(*counts, strict=True))


# Outputs and gradients ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_inductor_outputs_equal_eager_outputs(case: Case) -> None:
    twin = copy.deepcopy(case.pruned)
    expected = twin(case.x)  # after this first call YOLOv8 is one graph
    assert_alike(torch.compile(twin)(case.x), expected)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_compiled_pruned_systems_can_be_trained(case: Case) -> None:
    expected, twin = trained(case, copy.deepcopy(case.pruned)), copy.deepcopy(case.pruned)
    trained(case, twin, torch.compile(twin, backend="aot_eager"))
    assert_trained_alike(twin, expected)
