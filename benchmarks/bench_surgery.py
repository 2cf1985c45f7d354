"""What stays of a model when regions are removed: which modules change class, and how many cuts are plain identities.

    python -m benchmarks.bench_surgery [--six] [--systems NAME ...] [--budgets 0.1 0.2 0.3] [--rounds 31]

Every plan is carried out on models with random weights. A cut is *in place* if the removed region became
`torch.nn.Identity` (or a `PassThrough`) in its parent, and nothing else changed for it. A module *changed class* if
its path holds another class than in the unpruned model, and it is no identity. *Loads without fxprune* says whether a
pickle of the pruned model loads and runs in a process that cannot import fxprune.

With `--rounds`, the pruned model is timed against the same plan carried out on whole graphs, where every part that was
captured as a graph becomes one `GraphModule`; rounds are interleaved, with the latter timed twice (A/A). So is the
memory that autograd keeps for the backward pass.

Rows go to ``results/bench_surgery.jsonl``, the table to ``results/surgery.md``.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fxprune
from benchmarks.results import RESULTS, read_rows
from benchmarks.systems import add_options, choose_systems, read_sizes, write_rows
from fxprune.adapters.registry import unwrap
from fxprune.graph.fx_utils import is_within
from fxprune.profiling.interleaved_timing import compute_ratio, interleave
from fxprune.rewriting.pruned_module import PassThrough, PrunedModule
from tests.helpers.systems import Sizes, System
from tests.helpers.whole_rewrites import rewrite_whole

BATCH_IMAGES = 2
BLOCKER = "import sys; sys.modules['fxprune'] = None; import pickle; pickle.load(open(sys.argv[1], 'rb'))"

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Measure all systems, write the rows, render the table."""
    parser = argparse.ArgumentParser(description="What stays of a model when regions are removed.")
    add_options(parser)
    parser.add_argument("--six", action="store_true", help="only the six systems")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--criterion", default="fisher")
    parser.add_argument("--rounds", type=int, default=0, help="time the pruned models too")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = read_sizes(options)
    systems = choose_systems(options, everything=not options.six)
    write_rows("bench_surgery", (row for system in systems for row in measure(system, sizes, options)))
    table = "\n".join(render_table(read_rows("bench_surgery"))) + "\n"
    (RESULTS / "surgery.md").write_text(table, encoding="utf-8")
    print(table)


def measure(system: System, sizes: Sizes, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per budget."""
    model, batch = system.build(sizes, BATCH_IMAGES)
    try:
        analysis = fxprune.analyze(model, [batch], criterion=options.criterion)
    except fxprune.FxpruneError as error:
        yield {"system": system.name, "error": f"{type(error).__name__}: {error}"}
        return
    for budget in options.budgets:
        try:
            plan = analysis.plan(budget)
        except fxprune.BudgetError as error:
            yield {"system": system.name, "budget": budget, "error": str(error)}
            continue
        pruned = fxprune.apply(model, plan)
        row = {"system": system.name, "budget": budget, **describe_change(unwrap(model), unwrap(pruned), plan)}
        console.print(f"{system.name}, {budget:.0%}: {row['in_place']} of {row['cuts']} cuts in place")
        row["loads_without_fxprune"] = loads_without_fxprune(unwrap(pruned))
        if options.rounds:
            row |= time_against_whole(model, pruned, plan, batch, options.rounds)
        yield row


def describe_change(model: nn.Module, pruned: nn.Module, plan: fxprune.Plan) -> dict[str, Any]:
    """Count the cuts, those in place, and the modules whose class changed."""
    before = dict(model.named_modules(remove_duplicate=False))
    graphs = {path: part for path, part in pruned.named_modules() if isinstance(part, PrunedModule)}
    classes = [
        path for path, part in pruned.named_modules(remove_duplicate=False) if type(part) is not type(before[path])
    ]
    identities = [path for path in classes if isinstance(pruned.get_submodule(path), (nn.Identity, PassThrough))]
    in_place = [region for region in plan.removed if not any(is_within(layer, graphs) for layer in region.layers)]
    return {
        "cuts": len(plan.removed),
        "in_place": len(in_place),
        "modules": len(before),
        "changed_class": len(classes) - len(identities),
        "graphs": sorted(graphs),
        "others": [region.name for region in plan.removed if region not in in_place],
    }


def time_against_whole(model: Any, pruned: Any, plan: fxprune.Plan, batch: Any, rounds: int) -> dict[str, Any]:
    """Measure latency and kept memory of a pruned model, as a share of those of the whole rewritten graphs."""
    images = batch["img"] if isinstance(batch, dict) else batch[0]
    whole, cut = rewrite_whole(unwrap(model), plan, in_place=True).eval(), unwrap(pruned).eval()
    functions = {"whole": partial(whole, images), "again": partial(whole, images), "cut": partial(cut, images)}
    kept = kept_bytes(cut, images) / kept_bytes(whole, images)
    with torch.no_grad():  # heads keep tensors of a call, which must not be inference tensors
        timings = interleave(functions, rounds=rounds, warmup=3, device="cpu")
    ratio, floor = (compute_ratio(timings[name], timings["whole"]) for name in ("cut", "again"))
    console.print(f"  latency {ratio}, A/A {floor}, kept memory {kept:.3f}")
    return {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high, "floor": floor.median,
            "floor_low": floor.low, "floor_high": floor.high, "kept_memory": kept}  # fmt: skip


def kept_bytes(model: nn.Module, images: Any) -> int:
    """Count the bytes that autograd keeps between forward and backward, without the weights."""
    weights = {value.data_ptr() for value in model.parameters()}
    seen: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if value.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        _output = model(images)
        return sum(seen.values())


def loads_without_fxprune(model: nn.Module) -> bool:
    """Whether a process that cannot import fxprune loads a pickle of the model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pkl"
        path.write_bytes(pickle.dumps(model))
        command = [sys.executable, "-c", BLOCKER, str(path)]
        return subprocess.run(command, capture_output=True, env=dict(os.environ), check=False).returncode == 0


def render_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Render the rows as a Markdown table."""
    names = (
        "budget",
        "cuts",
        "in place",
        "modules",
        "changed class",
        "loads without fxprune",
        "latency",
        "A/A",
        "memory",
    )
    yield f"| system | {' | '.join(names)} |"
    yield "|---|" + "--:|" * len(names)
    for row in rows:
        if "error" in row:
            continue
        loads = "yes" if row["loads_without_fxprune"] else "no"
        cells = (row["system"], f"{row['budget']:.0%}", row["cuts"], row["in_place"], row["modules"],
                 row["changed_class"], loads, *timing_cells(row))  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def timing_cells(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the cells of latency, its A/A floor, and memory, against whole graphs."""
    if "ratio" not in row:
        yield from ("", "", "")
        return
    for name in ("ratio", "floor"):
        yield f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
    yield f"{row['kept_memory']:.2f}"


if __name__ == "__main__":
    main()
