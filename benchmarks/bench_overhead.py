"""The time of an attribution pass, compared with a training step and with Captum, and the time of capture.

    python -m benchmarks.bench_overhead [--rounds 7] [--only overhead captum capture] [--systems NAME ...]
                                        [--clock cpu --threads 1]

All functions that are compared compute the same loss of the same batch, with norms in eval mode. They are timed in
turn, round by round. A ratio is the median over the rounds, with quartiles. The A/A floor is the ratio of a function to
itself: differences smaller than it are noise. Rows go to ``results/bench_overhead.jsonl``, in place of those of the
last run.

- ``overhead``: the attribution pass of `fxprune.analyze` (forward, backward, one number for every node and region),
  compared with forward and backward with gradients of all weights (a training step without its optimizer), and with
  forward and backward with frozen weights and gradients of the images.
- ``captum``: the same pass on ResNet-50, compared with `captum.attr.LayerGradientXActivation`: one layer a call (timed
  on a few layers evenly spread over the depth, and scaled to all), and all layers in one call. Largest difference of
  the results.
- ``capture``: seconds of capture, shape proofs and region search, with one image.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from benchmarks.systems import add_options, choose_systems, read_sizes, write_rows
from fxprune.adapters.calls import AdaptedModel, normalize_and_label
from fxprune.adapters.protocol import Adapter, Batch
from fxprune.adapters.registry import choose_adapter
from fxprune.attribution.captured_model import CapturedModel, find_all_regions
from fxprune.attribution.criteria import get_criterion
from fxprune.attribution.recorder import AttributionRecord
from fxprune.attribution.scoring import record_attribution
from fxprune.profiling.interleaved_timing import Timing, compute_ratio, interleave
from fxprune.runtime.private_copy import private_copy
from fxprune.runtime.progress import no_progress
from tests.helpers.systems import SIX, System

PARTS = ("overhead", "captum", "capture")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` is the processor time of this process: for a busy machine, with one thread."""


@dataclass(frozen=True)
class Prepared:
    """A copy of a model with frozen weights, its adapter, and a copy of a batch in the adapter's form."""

    model: nn.Module
    raw: Any
    adapter: Adapter
    batch: Batch


def prepare(model: nn.Module, raw: Any) -> Prepared:
    """Copy a model and a batch, so that functions do not affect each other."""
    twin, own = private_copy(model), copy.deepcopy(raw)
    adapter = choose_adapter(twin, own, None)
    adapter.prepare(twin)
    return Prepared(twin, own, adapter, normalize_and_label(twin, adapter, own, 0))


def capture_prepared(ready: Prepared) -> CapturedModel:
    """Capture a prepared model and find its regions."""
    return find_all_regions(AdaptedModel(ready.model, ready.adapter), ready.batch)


def make_recording_pass(model: nn.Module, raw: Any, criterion: str = "fisher") -> Callable[[], AttributionRecord]:
    """Make the attribution pass of `fxprune.analyze` over one batch, which records every node and region."""
    ready = prepare(model, raw)
    captured = capture_prepared(ready)
    chosen = get_criterion(criterion)[1]

    def record() -> AttributionRecord:
        batch = captured.adapted.read(0, ready.raw)
        return record_attribution(captured, chosen, [batch], {}, no_progress)[0]

    return record


def make_bare_pass(model: nn.Module, raw: Any, frozen: bool) -> Callable[[], None]:
    """Make a forward and backward pass of the uncaptured model.

    Gradients are of all weights, or, with `frozen` weights, of the images.
    """
    ready = prepare(model, raw)
    inputs = tree_leaves(ready.batch.images) if frozen else list(ready.model.parameters())
    for tensor in inputs:
        tensor.requires_grad_()

    def run() -> None:
        torch.manual_seed(0)
        for tensor in inputs:
            tensor.grad = None
        ready.adapter.loss(ready.model, ready.batch).sum().backward()  # type: ignore[no-untyped-call]

    return run


def ratio_quartiles(timings: dict[str, Timing], name: str, base: str) -> dict[str, Any]:
    """Compute a ratio of two timings, as median and quartiles."""
    ratio = compute_ratio(timings[name], timings[base])
    return {key: round(getattr(ratio, key), 4) for key in ("median", "low", "high")}


def measure_overhead(system: System, options: argparse.Namespace) -> dict[str, Any]:
    """Time the attribution pass of a system and bare passes in turn."""
    sizes, rounds = read_sizes(options), options.rounds
    model, raw = system.build(sizes)
    recording, training = make_recording_pass(model, raw), make_bare_pass(model, raw, frozen=False)
    record = recording()
    functions: dict[str, Callable[[], object]] = {
        "recording": recording,
        "training": training,
        "frozen": make_bare_pass(model, raw, frozen=True),
        "training again": training,
    }
    timings = interleave(functions, rounds=rounds, clock=CLOCKS[options.clock])
    return {
        "part": "overhead",
        "system": system.name,
        "images": record.images,
        "nodes": len(record.grad_act),
        "regions": len(record.grad_delta),
        "recording_ms": round(timings["recording"].median_ms, 1),
        "training_ms": round(timings["training"].median_ms, 1),
        "frozen_ms": round(timings["frozen"].median_ms, 1),
        "over_training": ratio_quartiles(timings, "recording", "training"),
        "over_frozen": ratio_quartiles(timings, "recording", "frozen"),
        "floor": ratio_quartiles(timings, "training again", "training"),
        "rounds": rounds,
    }


def list_captum_layers(model: nn.Module) -> list[str]:
    """List the leaf modules that a forward pass calls once; Captum keeps one value per module."""
    leaves = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear)
    return [name for name, module in model.named_modules() if isinstance(module, leaves)]


def make_captum_pass(model: nn.Module, raw: Any, names: Sequence[str], at_once: bool) -> Callable[[], dict[str, float]]:
    """Make a pass that gives ``E [sum |dL/dA * A|]`` of layers with Captum: in one call, or one layer a call."""
    from captum.attr import LayerGradientXActivation

    ready = prepare(model, raw)
    for module in ready.model.modules():  # an in-place ReLU overwrites the activation that Captum reads
        if isinstance(module, nn.ReLU):
            module.inplace = False
    layers = [ready.model.get_submodule(name) for name in names]
    images, labels = ready.batch.images, ready.batch.targets

    def loss(images: Tensor) -> Tensor:
        return functional.cross_entropy(ready.model(images), labels).reshape(1)

    def run() -> dict[str, float]:
        calls = [layers] if at_once else layers
        found = [LayerGradientXActivation(loss, call).attribute(images) for call in calls]
        return {name: float(value.detach().abs().sum()) for name, value in zip(names, tree_leaves(found), strict=True)}

    return run


def measure_captum(options: argparse.Namespace) -> dict[str, Any]:
    """Time the attribution pass of ResNet-50 and Captum on the same layers in turn."""
    sizes, rounds, sample = read_sizes(options), options.captum_rounds, options.captum_layers
    model, raw = SIX[0].build(sizes)
    names = list_captum_layers(model)
    spread = torch.linspace(0, len(names) - 1, min(sample or len(names), len(names))).round().long().tolist()
    some = [names[index] for index in spread]
    recording = make_recording_pass(model, raw, "grad_act")  # the same gradients as Captum's: no gates
    together = make_captum_pass(model, raw, names, at_once=True)
    ours, theirs = recording().grad_act, together()
    apart = [abs(ours["", name.replace(".", "_")] / theirs[name] - 1) for name in names]
    functions: dict[str, Callable[[], object]] = {
        "recording": recording,
        "each": make_captum_pass(model, raw, some, at_once=False),
        "together": together,
        "recording again": recording,
    }
    timings = interleave(functions, rounds=rounds, clock=CLOCKS[options.clock])
    scale = len(names) / len(some)
    each = {key: round(value * scale, 2) for key, value in ratio_quartiles(timings, "each", "recording").items()}
    return {
        "part": "captum",
        "system": SIX[0].name,
        "images": sizes.classifier_images,
        "layers": len(names),
        "layers_timed": len(some),
        "recording_ms": round(timings["recording"].median_ms, 1),
        "each_layer_ms": round(timings["each"].median_ms * scale, 1),
        "together_ms": round(timings["together"].median_ms, 1),
        "each_layer_over_recording": each,
        "together_over_recording": ratio_quartiles(timings, "together", "recording"),
        "floor": ratio_quartiles(timings, "recording again", "recording"),
        "largest_relative_difference": float(f"{max(apart):.1e}"),
        "rounds": rounds,
    }


def measure_capture(system: System, options: argparse.Namespace) -> dict[str, Any]:
    """Time capture, shape proofs and region search of a system with one image."""
    rounds, clock = options.captures, CLOCKS[options.clock]
    model, raw = system.build(read_sizes(options), images=1)
    ready = iter([prepare(model, raw) for _ in range(rounds)])
    functions = {"capture": lambda: capture_prepared(next(ready))}
    timing = interleave(functions, rounds=rounds, warmup=0, clock=clock)["capture"]
    seconds = [round(latency / 1e3, 2) for latency in timing.latency_ms]
    return {"part": "capture", "system": system.name, "capture_s": round(timing.median_ms / 1e3, 2), "each_s": seconds}


def measure(options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """Measure all parts asked for, row by row."""
    clock = {"clock": options.clock}
    for system in choose_systems(options):
        with console.status(system.name):
            if "capture" in options.only:
                yield measure_capture(system, options) | clock
            if "overhead" in options.only:
                yield measure_overhead(system, options) | clock
    if "captum" in options.only:
        with console.status("captum"):
            yield measure_captum(options) | clock


def render_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Render rows as a table; a ratio has its median and quartiles."""
    table = Table("part", "system", "measured", "value")
    for row in rows:
        skipped = ("part", "system", "machine")
        for index, (key, value) in enumerate((k, v) for k, v in row.items() if k not in skipped):
            if isinstance(value, dict):
                value = f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            table.add_row(*((row["part"], row["system"]) if not index else ("", "")), key, str(value))
        table.add_section()
    return table


def main(argv: list[str] | None = None) -> None:
    """Measure, write the rows, print the table."""
    parser = argparse.ArgumentParser(description="The time of an attribution pass, and of capture.")
    add_options(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--captures", type=int, default=3, help="how often each capture is timed")
    parser.add_argument("--captum-rounds", type=int, default=3)
    parser.add_argument("--captum-layers", type=int, default=11, help="layers to time one by one; 0 for all")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a busy machine")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    Console().print(render_table(write_rows("bench_overhead", measure(options, Console(stderr=True)))))


if __name__ == "__main__":
    main()
