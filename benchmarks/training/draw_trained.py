"""Draw the trained detectors, with the regions that a plan by ``fisher`` removes.

    python -m benchmarks.training.draw_trained [MODEL ...] [--budget 0.1] [--out pictures]

Each detector gets an HTML page of the analysis, which opens with the plan, and an SVG picture of the plan. The
pictures in ``docs/`` were made by this command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fxprune
from benchmarks.subjects import add_options, load_subjects


def main(argv: list[str] | None = None) -> None:
    """Draw the detectors asked for."""
    parser = argparse.ArgumentParser(description="Pictures of the trained detectors.")
    add_options(parser)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder to write to")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in load_subjects(options):
        analysis = fxprune.analyze(subject.model, subject.batches())
        plan = analysis.plan(options.budget)
        fxprune.draw(analysis, options.out / f"{subject.name}.html", plan=plan)
        fxprune.draw(plan, options.out / f"{subject.name}.svg")
        print(f"{subject.name}: {', '.join(region.name for region in plan.removed)}")


if __name__ == "__main__":
    main()
