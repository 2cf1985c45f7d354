"""Work for tests with several processes, and how the processes are started."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes

import fxprune
from fxprune.adapters import torchvision
from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch
from fxprune.demo.bundled import load_dataset, load_detector
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.heal import _make_pair, heal_student
from fxprune.healing.methods import HealingContext
from fxprune.healing.reconstruction import least_squares
from fxprune.rewriting.history import applied_plans
from fxprune.runtime.distributed import rank_and_world, run_on_rank_zero, take_shard
from fxprune.search.judges import DetectionAgreement
from tests.helpers.models import pixels, tiny

Job = Callable[[Path], Any]
Jobs = Mapping[str, Job]


def run_jobs(jobs: Jobs, world: int, folder: Path) -> list[dict[str, Any]]:
    """Let processes do some jobs one after the other; returns what came of each by its name, a mapping a process."""
    start: Any = start_processes
    multiprocessing.set_forkserver_preload(["tests.helpers.processes"])  # what takes long to import, once for all
    start(_work, args=(jobs, world, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def do_jobs(jobs: Jobs, folder: Path) -> dict[str, Any]:
    """Do jobs in this process."""
    return {name: _done(job, folder) for name, job in jobs.items()}


def _work(rank: int, jobs: Jobs, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), world, rank)
    torch.save(do_jobs(jobs, folder), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _done(job: Job, folder: Path) -> Any:
    try:
        return job(folder)
    except Exception as error:  # is the result, and shown in words
        return f"{type(error).__name__}: {error}"


# What they work on ----------------------------------------------------------------------------------------------------

Loader = Callable[[], Any]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Four labelled batches of four images and one of three."""
    return [labelled(index, size) for index, size in enumerate((4, 4, 4, 4, 3))]


def labelled(index: int, size: int) -> tuple[Tensor, Tensor]:
    return pixels(size, 3, 16, 16, seed=index), (torch.arange(size) + index) % 5


def one_by_one() -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches()


def partly_labelled() -> list[Any]:
    """The second batch, which is the second process's, without labels."""
    first, second, *rest = batches()
    return [first, second[0], *rest]


def two_batches() -> list[tuple[Tensor, Tensor]]:
    return batches()[:2]


def small_last() -> list[tuple[Tensor, Tensor]]:
    return [*batches()[:3], labelled(3, 1)]


def four_channels() -> list[tuple[Tensor, Tensor]]:
    """No model takes the second batch; that is seen by the process that runs it."""
    first, second, *rest = batches()
    return [first, (second[0].repeat(1, 2, 1, 1)[:, :4], second[1]), *rest]


def each_its_own() -> list[tuple[Tensor, Tensor]]:
    return [labelled(index + rank_and_world()[0], 4) for index in range(4)]


def more_for_the_first() -> list[tuple[Tensor, Tensor]]:
    return batches()[: 5 - rank_and_world()[0]]


def broken_disk() -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches()[:3]
    if rank_and_world()[0] == 1:
        raise OSError("the disk is gone")
    yield from batches()[3:]


# What they do ---------------------------------------------------------------------------------------------------------


def analyze(folder: Path, loader: Loader = batches, **options: Any) -> dict[str, Any]:
    return fxprune.analyze(tiny(), loader(), **options).plan(0.3).to_dict()


def heal(folder: Path, method: str, loader: Loader = batches, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    model, pruned = _pruned(seed)
    return dict(fxprune.heal(pruned, model, loader(), method, **options).state_dict())


def heal_by_rows(folder: Path) -> dict[str, Tensor]:
    """As if no layer were narrow enough for sums over its weights."""
    with patch.object(least_squares, "MAX_PRIMAL_INPUTS", 0):
        return heal(folder, "affine")


def fit_unlooked(folder: Path) -> None:
    """Fits the layers by batches of which no other process has seen that one cannot be run."""
    model, pruned = _pruned(0)
    heal_student(pruned, model, four_channels(), "affine", None, HealingContext())


def stop_early(folder: Path) -> tuple[list[int], dict[str, Tensor]]:
    """A training that does nothing but harm; the steps it took, and what came of it."""
    steps: list[int] = []

    def note(stage: str, done: int, total: int | None) -> None:
        if stage == "mimic":
            steps.append(done)

    return steps, heal(folder, "mimic", steps=20, learning_rate=1e30, progress=note)


def prune(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    pruned = fxprune.compile(tiny(), [*partly_labelled(), *batches()[:2]], **options)
    return [plan.to_dict() for plan in applied_plans(pruned)], dict(pruned.state_dict())


def measure_distance(folder: Path) -> float:
    """How far the features of a pruned model are off."""
    model, pruned = _pruned(0)
    pair, read = _make_pair(model, pruned, applied_plans(pruned), batches(), None)
    return FeatureDistance(pair, read).mean(read)


def measure_agreement(folder: Path) -> float:
    """How much of what a detector finds another one finds that is a little off."""
    model, other = load_detector(), load_detector()
    with torch.no_grad():
        for weight in other.head.parameters():
            weight.mul_(0.9)
    dataset = load_dataset("calibration")
    batches = [Batch([dataset[2 * index + place][0] for place in (0, 1)], None, 2) for index in range(4)]
    original = AdaptedModel.copy_of(model, torchvision.ADAPTER)
    judge = DetectionAgreement(original, take_shard(list(enumerate(batches))))
    return judge.increase(other)


def broken_criterion(region: Any, modules: Any) -> float:
    """A criterion of the caller's that the third process fails at."""
    known = {} if rank_and_world()[0] == 2 and region.name == "blocks.1" else {region.name: 1.0}
    return known[region.name]


def analyze_own_model(folder: Path) -> Any:
    return fxprune.analyze(tiny(rank_and_world()[0]), batches())


def fail_alone(folder: Path) -> Any:
    """What the first process fails at, the others learn."""

    def fail() -> None:
        raise fxprune.errors.SettingError("it is Monday")

    return run_on_rank_zero(fail)


def _pruned(seed: int) -> tuple[nn.Module, nn.Module]:
    cheap = ("blocks.0", "blocks.2")
    model = tiny(seed)
    analysis = fxprune.analyze(model, batches(), criterion=lambda region, _: float(region.name not in cheap))
    return model, fxprune.apply(model, analysis.plan(0.4))
