"""A pruned YOLO stays pruned when it is trained on, in this process and in others; what cannot be kept is refused."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.adapters.ultralytics.yolo import rewrap_yolo
from fxprune.planning.plan import Plan
from tests.helpers.yolo_data import TRAINING, count, write_data

pytestmark = pytest.mark.filterwarnings("ignore:.*It looks untrained:fxprune.FxpruneWarning")  # the weights are random
ultralytics = pytest.importorskip("ultralytics")
detect: Any = pytest.importorskip("ultralytics.models.yolo.detect")
NAMES = ["cat", "dog", "fox"]
IDENTITIES = ("model.2.cv1", "model.8.cv1", "model.22.cv2.0.1", "model.22.cv3.1.1")
"""Regions of a YOLOv8n that become identities where they are."""


class Mine(detect.DetectionTrainer):  # type: ignore[misc]
    """A user's trainer with a `get_model` of its own."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        network = super().get_model(cfg, weights, verbose)
        network.mine = True
        return network


def plan_without(yolo: Any, budget: float, *cheap: str) -> Plan:
    """Plan the removal of some regions first."""
    score = (lambda region, _: float(region.name not in cheap)) if cheap else "random"
    return fxprune.analyze(yolo, [torch.rand(2, 3, 64, 64)], criterion=score).plan(budget)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def full(folder: Path) -> Any:
    """A YOLOv8n of a file, whose classes have names."""
    torch.manual_seed(0)
    yolo = ultralytics.YOLO("yolov8n.yaml")
    yolo.model.names = {index: f"thing {index}" for index in range(80)} | {7: "Fox "}
    yolo.save(folder / "start.pt")
    return ultralytics.YOLO(folder / "start.pt")


@pytest.fixture(scope="module")
def pruned(full: Any) -> Any:
    """The same without blocks that become identities, and blocks whose parent becomes a graph."""
    return fxprune.apply(full, plan_without(full, 0.25))


@pytest.fixture(scope="module")
def trained(pruned: Any, folder: Path) -> Any:
    """The pruned model after an epoch on three classes, with a checkpoint from the first of two epochs."""
    model = rewrap_yolo(pruned, copy.deepcopy(pruned.model))
    data = write_data(folder / "data", NAMES)
    saved = folder / "stopped.pt"

    def keep(trainer: Any) -> None:
        if not saved.exists():
            saved.write_bytes(Path(trainer.last).read_bytes())

    yolo: Any = model
    yolo.add_callback("on_model_save", keep)
    yolo.train(data=data, epochs=2, name="first", project=str(folder), freeze=1, multi_scale=0.5, **TRAINING)
    return yolo


@pytest.fixture
def data(folder: Path, trained: Any) -> str:
    return str(folder / "data" / "data.yaml")


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the state but for the layers that have a row per class."""
    last = [f"model.22.cv3.{level}.2." for level in range(3)]
    return {key: tuple(value.shape) for key, value in network.state_dict().items() if not key.startswith(tuple(last))}


def test_training_keeps_what_was_removed_and_takes_the_classes(pruned: Any, trained: Any, folder: Path) -> None:
    assert shapes(trained.model) == shapes(pruned.model)
    assert list(trained.names.values()) == NAMES
    assert trained.model.model[-1].nc == 3
    for name in ("last.pt", "best.pt"):
        reloaded = ultralytics.YOLO(folder / "first" / "weights" / name)
        assert shapes(reloaded.model) == shapes(pruned.model)
        assert fxprune.report(reloaded).removed == fxprune.report(pruned).removed


def test_training_starts_from_the_weights_of_the_pruned_model(pruned: Any, trained: Any) -> None:
    old, new = pruned.model.state_dict(), trained.model.state_dict()
    frozen = [key for key in shapes(pruned.model) if key.startswith("model.0.") and "weight" in key]
    assert frozen
    assert all(torch.equal(old[key].half(), new[key].half()) for key in frozen)
    assert any(not torch.equal(old[key], new[key]) for key in old.keys() & new.keys() if old[key].is_floating_point())


def test_the_original_is_left_alone(full: Any, pruned: Any, trained: Any) -> None:
    assert len(full.callbacks["on_model_save"]) == len(pruned.callbacks["on_model_save"]) == 1
    assert len(trained.callbacks["on_model_save"]) == 2
    assert len(full.names) == 80
    assert "unpruned" not in full.model.yaml
    assert Path(pruned.model.pt_path).name == "start_pruned.pt"
    assert Path(full.model.pt_path).name == "start.pt"


IN_ANOTHER_PROCESS = """
import sys, torch
from pathlib import Path
from ultralytics import YOLO
from tests.helpers.yolo_data import TRAINING, count
folder = Path(sys.argv[1])
resumed = YOLO(folder / "stopped.pt")
resumed.train(resume=True)
again = YOLO(folder / "first/weights/best.pt")
again.train(data=str(folder / "data/data.yaml"), epochs=1, name="again", project=str(folder), **TRAINING)
print("sizes", count(resumed.model), count(again.model))
"""


@pytest.mark.slow
def test_another_process_resumes_and_trains_on(trained: Any, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert f"sizes {count(trained.model)} {count(trained.model)}" in done.stdout


@pytest.mark.slow
def test_distillation_from_the_unpruned_model_keeps_the_pruned_one(trained: Any, folder: Path, data: str) -> None:
    model = ultralytics.YOLO(folder / "first" / "weights" / "best.pt")
    unpruned = str(folder / "start.pt")
    model.train(data=data, epochs=1, name="distilled", project=str(folder), distill_model=unpruned, **TRAINING)
    assert count(model.model) == count(trained.model)
    assert count(ultralytics.YOLO(folder / "distilled" / "weights" / "best.pt").model) == count(trained.model)


@pytest.mark.slow
def test_a_list_of_data_sets_trains_a_pruned_model_each(trained: Any, folder: Path, data: str) -> None:
    model = ultralytics.YOLO(folder / "first" / "weights" / "best.pt")
    other = write_data(folder / "other", ["one", "two"])
    results = model.train(data=[data, other], epochs=1, project=str(folder / "many"), **TRAINING)
    assert len(results) == 2
    assert all(results.values())
    found = [ultralytics.YOLO(path) for path in (folder / "many").rglob("best.pt")]
    assert sorted(len(yolo.names) for yolo in found) == [2, 3]
    assert all(shapes(yolo.model) == shapes(trained.model) for yolo in found)


def test_get_model_of_a_users_trainer_gets_the_pruned_network(pruned: Any, folder: Path, data: str) -> None:
    overrides = {"data": data, "project": str(folder), "name": "own", "model": "yolov8n.yaml", "task": "detect"}
    own = fxprune.trainer(Mine)(overrides={**overrides, **TRAINING})
    network = own.get_model(cfg=pruned.model.yaml, weights=pruned.model)
    assert network.mine
    assert shapes(network) == shapes(pruned.model)
    assert network is not pruned.model


def test_trainer_trains_an_unpruned_network_as_its_base_does(full: Any, folder: Path, data: str) -> None:
    overrides = {"data": data, "project": str(folder), "name": "full", "model": "yolov8n.yaml", "task": "detect"}
    networks = []
    for kind in (detect.DetectionTrainer, fxprune.trainer(detect.DetectionTrainer)):
        torch.manual_seed(0)
        made = kind(overrides={**overrides, **TRAINING}).get_model(cfg=full.model.yaml, weights=full.model)
        networks.append(made.state_dict())
    assert networks[0].keys() == networks[1].keys()
    assert all(torch.equal(value, networks[1][key]) for key, value in networks[0].items())


def test_trainer_is_pickled_by_name() -> None:
    for base in (detect.DetectionTrainer, Mine):
        kind = fxprune.trainer(base)
        assert issubclass(kind, base)
        assert fxprune.trainer(base) is kind is fxprune.trainer(kind)
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_trainer_of_something_else_is_refused() -> None:
    for wrong in (nn.Module, "DetectionTrainer", None):
        with pytest.raises(fxprune.SettingError, match="expected a trainer of ultralytics"):
            fxprune.trainer(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pretrained": False}, "leave pretrained=False"), ({"pretrained": "start.pt"}, "was not pruned")],
)
def test_weights_that_do_not_fit_are_refused(
    pruned: Any, folder: Path, data: str, settings: dict[str, Any], message: str
) -> None:
    settings = {key: str(folder / value) if isinstance(value, str) else value for key, value in settings.items()}
    model: Any = rewrap_yolo(pruned, copy.deepcopy(pruned.model))
    with pytest.raises(fxprune.ModelError, match=message):
        model.train(data=data, epochs=1, name="no", project=str(folder), **settings, **TRAINING)


def test_a_fused_network_and_tune_are_refused(pruned: Any, folder: Path, data: str) -> None:
    model: Any = rewrap_yolo(pruned, copy.deepcopy(pruned.model))
    with pytest.raises(fxprune.ModelError, match="tune"):
        model.tune(data=data, iterations=1)
    model.fuse(verbose=False)
    with pytest.raises(fxprune.ModelError, match="fused"):
        model.train(data=data, epochs=1, name="no", project=str(folder), **TRAINING)


def test_the_plain_trainer_refuses_by_name_what_it_cannot_build(pruned: Any) -> None:
    tasks: Any = pytest.importorskip("ultralytics.nn.tasks")
    with pytest.raises(KeyError, match="was pruned by fxprune"):
        tasks.DetectionModel(pruned.model.yaml, nc=3, verbose=False)


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fxprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import numpy
from ultralytics import YOLO
print(len(YOLO(sys.argv[1]).predict(numpy.zeros((64, 64, 3), "uint8"), imgsz=64, verbose=False)))
"""


def without_package(path: Path, safe: bool) -> subprocess.CompletedProcess[str]:
    """Predict with a checkpoint in a process that cannot import this package."""
    environment = {**os.environ, "ULTRALYTICS_SAFE_LOAD": str(int(safe)), "YOLO_AUTOINSTALL": "true"}
    command = [sys.executable, "-c", BLOCKED, str(path)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("safe", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "safe"])
def test_identities_need_no_package(full: Any, folder: Path, safe: bool) -> None:
    model: Any = fxprune.apply(full, plan_without(full, 0.06, *IDENTITIES))
    model.save(folder / "identities.pt")
    done = without_package(folder / "identities.pt", safe)
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["1"]), done.stderr


def test_a_graph_says_what_to_install(pruned: Any, folder: Path) -> None:
    pruned.save(folder / "graph.pt")
    done = without_package(folder / "graph.pt", safe=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("pip install fxprune'")
    assert "AutoInstall" not in done.stdout + done.stderr


def test_saving_after_training_leaves_out_what_only_a_training_needs(trained: Any, folder: Path) -> None:
    trained.save(folder / "deployed.pt")
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(folder / "first" / "weights" / "best.pt")
    assert "pydoc.locate" in unsafe
    state = torch.load(folder / "deployed.pt", weights_only=False)
    assert not [name for name in vars(state["model"]) if "reload" in name]
    assert [name for name in vars(trained.model) if "reload" in name]


WRITER = """
import cloudpickle, sys, torch
import fxprune
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

class Own(DetectionTrainer):
    pass

kind = {"own": Own, "plain": DetectionTrainer}[sys.argv[3]]
state = {"trainer": fxprune.trainer(kind), "model": YOLO(sys.argv[1]).model}
torch.save(state, sys.argv[2], pickle_module=cloudpickle)
"""
READER = """
import sys, torch
state = torch.load(sys.argv[2], weights_only=False)
kind, network = state["trainer"], state["model"]
print("fxprune" in sys.modules, kind.fxprune_keeps_pruned, sum(value.numel() for value in network.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "own"])
def test_processes_of_several_devices_get_the_trainer_and_the_network(trained: Any, folder: Path, kind: str) -> None:
    pytest.importorskip("cloudpickle", reason="ultralytics needs it to train on several devices")
    arguments = [str(folder / "first" / "weights" / "best.pt"), str(folder / f"state_{kind}.pt"), kind]
    for code in (WRITER, READER):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"True True {count(trained.model)}"
