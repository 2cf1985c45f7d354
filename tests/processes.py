"""Work for several processes: what each of them does on its own, and how they are started on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import start_processes

import fxprune
from tests.models import pixels, tiny

Job = Callable[[Path], Any]
CUT = ("blocks.0", "blocks.2")


def run_jobs(jobs: dict[str, Job], world: int, folder: Path) -> list[dict[str, Any]]:
    """Let processes do some jobs one after the other; returns what came of each, or its error, a mapping a process."""
    multiprocessing.set_forkserver_preload(["tests.processes"])  # what takes long to import, once for all
    start: Any = start_processes
    start(_work, args=(jobs, world, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def do(jobs: dict[str, Job], folder: Path) -> dict[str, Any]:
    """Do jobs here."""
    return {name: _attempt(job, folder) for name, job in jobs.items()}


def _work(rank: int, jobs: dict[str, Job], world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{folder}/store", wait, world, rank)
    torch.save(do(jobs, folder), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _attempt(job: Job, folder: Path) -> Any:
    try:
        return job(folder)
    except fxprune.FxpruneError as error:
        return f"{type(error).__name__}: {error}"


# What they do ---------------------------------------------------------------------------------------------------------


def batches(count: int = 5, images: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches, the last one smaller."""
    sizes = [images] * (count - 1) + [images - 1]
    return [(pixels(size, 3, 16, 16, seed=i), (torch.arange(size) + i) % 5) for i, size in enumerate(sizes)]


def analyzed(criterion: str) -> Any:
    analysis = fxprune.analyze(tiny(), batches(), criterion=criterion)
    return analysis.plan(0.3).to_dict()


def healed(method: str, **settings: Any) -> dict[str, Tensor]:
    model = tiny()
    analysis = fxprune.analyze(tiny(), batches(), criterion=lambda region, _: float(region.name not in CUT))
    pruned = fxprune.apply(model, analysis.plan(0.4))
    return dict(fxprune.heal(pruned, model, batches(), method, **settings).state_dict())
