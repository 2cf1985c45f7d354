"""Pruned models through torch.export, ONNX, OpenVINO and ExecuTorch: smaller, and with the same outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves

import fxprune
from tests.helpers.cases import Case
from tests.helpers.comparisons import assert_same_boxes
from tests.helpers.models import tiny
from tests.helpers.systems import MORE, SIX, System

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "torch.jit.TracerWarning", "UserWarning:torch")
]

SYSTEMS = {system.name: system for system in (*SIX, *MORE, System("tiny", "classifier", lambda px: tiny()))}
CLASSIFIERS = ("resnet50", "mobilenet_v2", "shufflenet_v2_x1_0")
DETECTORS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large")


def systems(*names: str) -> pytest.MarkDecorator:
    """Run a test on systems, each pruned by the shared plan; all but the tiny one are slow."""
    marks = [[] if name == "tiny" else [pytest.mark.slow] for name in names]
    cases = [pytest.param(SYSTEMS[name], marks=mark, id=name) for name, mark in zip(names, marks, strict=True)]
    return pytest.mark.parametrize("case", cases, indirect=True)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Exported:
    """What came of an export: its operations, size in bytes, how to run it, and names of its weights if it has them."""

    ops: Counter[str]
    size: int
    run: Callable[..., Any]
    weights: frozenset[str] = frozenset()


def assert_same(found: Sequence[Any], expected: Any) -> None:
    tensors = [leaf.numpy() for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]
    assert len(found) == len(tensors) > 0
    for first, second in zip(found, tensors, strict=True):
        scale = float(np.abs(second).max())
        assert scale > 1e-3  # else any zeros would do
        np.testing.assert_allclose(np.asarray(first), second, rtol=1e-3, atol=1e-4 * scale)


def assert_smaller(whole: Exported, pruned: Exported, layers: int, kinds: Sequence[str]) -> None:
    """Hold operations of some kinds to the number of layers in the pruned model, and all else to being less."""
    before, after = (sum(exported.ops[kind] for kind in kinds) for exported in (whole, pruned))
    assert after == layers < before
    assert pruned.ops.total() < whole.ops.total()
    assert pruned.size < whole.size


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def assert_weights_gone(case: Case, whole: Exported, pruned: Exported) -> None:
    gone = {*case.model.state_dict()} - {*case.pruned.state_dict()}
    assert whole.weights & gone
    assert not pruned.weights & gone


# ONNX -----------------------------------------------------------------------------------------------------------------


def read_onnx(file: Path) -> Exported:
    onnx = pytest.importorskip("onnx", reason="pip install onnx")
    session = pytest.importorskip("onnxruntime", reason="pip install onnxruntime").InferenceSession(str(file))
    graph = onnx.load(file).graph

    def run(*images: Tensor) -> Any:
        names = [given.name for given in session.get_inputs()]
        return session.run(None, {name: image.numpy() for name, image in zip(names, images, strict=True)})

    weights = frozenset(weight.name for weight in graph.initializer)
    return Exported(Counter(node.op_type for node in graph.node), file.stat().st_size, run, weights)


def to_onnx(model: nn.Module, x: Any, file: Path, **settings: Any) -> Exported:
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, **settings)
    assert program is not None
    program.save(file)
    return read_onnx(file)


@systems("tiny", *CLASSIFIERS)
def test_onnx_export_is_smaller_and_gives_the_same(case: Case, tmp_path: Path) -> None:
    free = ({0: torch.export.Dim("n")},)
    whole, pruned = (
        to_onnx(model, case.x, tmp_path / f"{index}.onnx", dynamic_shapes=free)
        for index, model in enumerate((case.model, case.pruned))
    )
    assert_smaller(whole, pruned, convolutions(case.pruned), ["Conv"])
    assert_weights_gone(case, whole, pruned)
    more = torch.cat([case.x, case.x.flip(0), case.x[:1]])
    assert_same(pruned.run(more), case.pruned(more))


@systems("retinanet_resnet50_fpn")
def test_detector_backbone_is_exported_to_onnx(case: Case, tmp_path: Path) -> None:
    models = [model.get_submodule("backbone") for model in (case.model, case.pruned)]
    x = case.x[0][None]
    whole, pruned = (to_onnx(model, x, tmp_path / f"{index}.onnx") for index, model in enumerate(models))
    assert_smaller(whole, pruned, convolutions(models[1]), ["Conv"])
    assert_same(pruned.run(x), models[1](x))


@systems(*DETECTORS)
def test_whole_detectors_are_exported_by_the_older_onnx_exporter(case: Case, tmp_path: Path) -> None:
    def save(model: nn.Module, file: Path) -> Exported:
        torch.onnx.export(model, (case.x,), file, dynamo=False, opset_version=18)
        return read_onnx(file)

    whole, pruned = save(case.model, tmp_path / "whole.onnx"), save(case.pruned, tmp_path / "pruned.onnx")
    assert pruned.ops.total() < whole.ops.total()
    assert pruned.ops["Conv"] < whole.ops["Conv"]
    assert pruned.size < whole.size
    assert_weights_gone(case, whole, pruned)
    (boxes,) = case.pruned(case.x)
    found = {name: torch.as_tensor(value) for name, value in zip(boxes, pruned.run(*case.x), strict=True)}
    assert_same_boxes(found, boxes, tolerance=1e-3, share=0.97)


# torch.export ---------------------------------------------------------------------------------------------------------


@systems("tiny", *CLASSIFIERS)
def test_torch_export_is_smaller_and_gives_the_same(case: Case, tmp_path: Path) -> None:
    def save(model: nn.Module, file: Path) -> Exported:
        torch.export.save(torch.export.export(model, (case.x,)), file)
        program = torch.export.load(file)
        ops = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
        return Exported(ops, file.stat().st_size, program.module(), frozenset(program.state_dict))

    whole, pruned = save(case.model, tmp_path / "whole.pt2"), save(case.pruned, tmp_path / "pruned.pt2")
    assert_smaller(whole, pruned, convolutions(case.pruned), ["aten.conv2d.default"])
    assert pruned.weights == {*case.pruned.state_dict()} < whole.weights
    torch.testing.assert_close(pruned.run(case.x), case.pruned(case.x))


@systems(*DETECTORS)
def test_torch_export_treats_a_pruned_detector_like_an_unpruned_one(case: Case) -> None:
    """Of most it cannot tell which way suppression goes by the number of boxes."""

    def nodes(model: nn.Module) -> int | str:
        try:
            return len(torch.export.export(model, (case.x,), strict=False).graph.nodes)
        except GuardOnDataDependentSymNode as error:
            return type(error).__name__

    whole, pruned = nodes(case.model), nodes(case.pruned)
    assert pruned == whole if isinstance(whole, str) else isinstance(pruned, int) and pruned < whole


# OpenVINO and ExecuTorch ----------------------------------------------------------------------------------------------


def read_openvino(file: Path) -> Exported:
    core = pytest.importorskip("openvino", reason="pip install openvino").Core()
    model = core.read_model(file)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # else bfloat16 where there is AMX
    ops = Counter(op.get_type_name() for op in model.get_ops())
    size = file.stat().st_size + file.with_suffix(".bin").stat().st_size
    return Exported(ops, size, lambda x: [*compiled([x.numpy()]).values()])


@systems("mobilenet_v2")
def test_openvino_export_is_smaller_and_gives_the_same(case: Case, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install openvino")

    def save(model: nn.Module, file: Path) -> Exported:
        converted = openvino.convert_model(model, example_input=case.x)
        openvino.save_model(converted, file, compress_to_fp16=False)
        return read_openvino(file)

    whole, pruned = save(case.model, tmp_path / "whole.xml"), save(case.pruned, tmp_path / "pruned.xml")
    assert_smaller(whole, pruned, convolutions(case.pruned), ["Convolution", "GroupConvolution"])
    assert_same(pruned.run(case.x), case.pruned(case.x))


def read_executorch(file: Path) -> Exported:
    pytest.importorskip("executorch", reason="pip install executorch")
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.runtime import Runtime

    plan = deserialize_pte_binary(file.read_bytes()).program.execution_plan[0]
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    ops = Counter(plan.operators[call.op_index].name for call in calls if hasattr(call, "op_index"))
    method = Runtime.get().load_program(file).load_method("forward")
    return Exported(ops, file.stat().st_size, lambda x: method.execute([x]))


@systems("mobilenet_v2")
def test_executorch_export_is_smaller_and_gives_the_same(case: Case, tmp_path: Path) -> None:
    exir = pytest.importorskip("executorch.exir", reason="pip install executorch")

    def save(model: nn.Module, file: Path) -> Exported:
        file.write_bytes(exir.to_edge(torch.export.export(model, (case.x,))).to_executorch().buffer)
        return read_executorch(file)

    whole, pruned = save(case.model, tmp_path / "whole.pte"), save(case.pruned, tmp_path / "pruned.pte")
    assert_smaller(whole, pruned, convolutions(case.pruned), ["aten::convolution"])
    assert_same(pruned.run(case.x), case.pruned(case.x))


# Through ultralytics --------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[[Path], Exported], str, list[str]]] = {
    "onnx": (read_onnx, "*.onnx", ["Conv"]),
    "openvino": (read_openvino, "*.xml", ["Convolution"]),
    "executorch": (read_executorch, "*.pte", []),
}
"""By ultralytics' name: what reads a form, which file, and its convolutions; XNNPACK's part hides them."""


@pytest.mark.parametrize("form", FORMS)
@systems("yolov8n")
def test_yolo_is_exported_by_its_own_method(
    case: Case, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(form, reason=f"pip install {form}")  # ultralytics would try to install it
    from ultralytics import YOLO

    read, pattern, kinds = FORMS[form]
    yolo: Any = YOLO("yolov8n.yaml")
    yolo.model.load_state_dict(case.model.state_dict())
    pruned: Any = fxprune.apply(yolo, case.plan)

    def export(model: Any, folder: Path) -> Exported:
        folder.mkdir()
        monkeypatch.chdir(folder)
        model.export(format=form, imgsz=64)
        return read(next(folder.rglob(pattern)))

    whole, smaller = export(yolo, tmp_path / "whole"), export(pruned, tmp_path / "pruned")
    assert smaller.size < whole.size
    if kinds:
        assert_smaller(whole, smaller, convolutions(pruned.model), kinds)
    x = case.x[:1, :, :64, :64].contiguous()
    assert_same(smaller.run(x), pruned.model.eval()(x)[0])
