"""Render the rows of `benchmarks.bench_paper` to ``results/paper.md`` and ``results/paper_<model>.svg``.

python -m benchmarks.render_paper
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.results import RESULTS, Row, read_rows

OURS = "fisher"
STYLES = {
    "random": ("#999999", ":", "x"), "l1": ("#d55e00", "--", "v"), "grad_act": ("#e69f00", "-.", "s"),
    "grad_delta": ("#56b4e9", "-.", "D"), "fisher": ("#0072b2", "-", "o"), "ablation": ("#000000", "-", "^"),
    "oracle": ("#009e73", ":", "*"),
}  # fmt: skip
"""Colour (of Okabe and Ito's palette for the colour-blind), dash and marker of each criterion's line."""


def main(argv: list[str] | None = None) -> None:
    """Write the table and one figure per model."""
    argparse.ArgumentParser(description="Table and figures of what bench_paper measured.").parse_args(argv)
    rows, regions = sorted(read_rows("bench_paper"), key=sort_key), read_rows("bench_paper_regions")
    models = list(dict.fromkeys(row["model"] for row in rows))
    parts = [
        "# What each criterion keeps\n",
        "The mAP that is lost at each budget, without any training:\n",
        render_overview(rows, models),
        *(render_model([row for row in rows if row["model"] == model]) for model in models),
    ]
    parts += [render_summary(rows, models), render_agreement(regions)]
    (RESULTS / "paper.md").write_text("\n".join(parts), encoding="utf-8")
    for model in models:
        draw([row for row in rows if row["model"] == model], model)


def sort_key(row: Row) -> tuple[int, float]:
    """Make the sort key of a row: criterion, then budget."""
    names = ["none", *STYLES]
    return names.index(row["criterion"]) if row["criterion"] in names else len(names), row["budget"]


def render_overview(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Render the mAP that each criterion loses, a line per model and budget."""
    criteria = [name for name in dict.fromkeys(row["criterion"] for row in rows) if name != "none"]
    lines = [f"| detector (unpruned mAP) | budget | {' | '.join(criteria)} | FLOPs | latency |"]
    lines.append("|---|--:|" + "--:|" * (len(criteria) + 2))
    for model in models:
        own = average_seeds(row for row in rows if row["model"] == model)
        unpruned = next(row for row in own if row["criterion"] == "none")
        for budget in sorted({row["budget"] for row in own} - {0.0}):
            found = {row["criterion"]: row for row in own if row["budget"] == budget}
            losses = [f"{unpruned['mAP'] - found[name]['mAP']:.3f}" if name in found else "–" for name in criteria]
            ours = found.get(OURS, found[next(iter(found))])
            cost = f"−{1 - ours['flops'] / unpruned['flops']:.1%}", f"{ours['latency_ratio']:.2f}"
            lines.append(f"| {model} ({unpruned['mAP']:.3f}) | {budget:.0%} | {' | '.join((*losses, *cost))} |")
    notes = f"FLOPs and latency (unpruned = 1) are those of `{OURS}`; `oracle` knows the mAP drop of each region alone."
    return "\n".join([*lines, "", notes, ""])


def average_seeds(rows: Iterable[Row]) -> list[Row]:
    """Average rows over seeds; gives one row per criterion and budget, with the spread of the mAP."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["criterion"], row["budget"]), []).append(row)
    merged = []
    for group in groups.values():
        averaged = {
            key: mean(row[key] for row in group) for key in ("mAP", "mAP50", "flops", "params", "latency_ratio")
        }
        spread = max(row["mAP"] for row in group) - min(row["mAP"] for row in group)
        merged.append({**group[0], **averaged, "spread": spread, "seeds": len(group)})
    return merged


def render_model(rows: Sequence[Row]) -> str:
    """Render the table of one model, a line per criterion and budget."""
    (unpruned,) = (row for row in rows if row["criterion"] == "none")
    noise = f"{unpruned['floor']:.3f} [{unpruned['floor_low']:.3f}, {unpruned['floor_high']:.3f}]"
    lines = [
        f"\n## {unpruned['model']}\n",
        f"Unpruned: mAP {unpruned['mAP']:.3f}, mAP50 {unpruned['mAP50']:.3f}, {unpruned['flops'] / 1e9:.2f} GFLOPs,"
        f" {unpruned['params'] / 1e6:.1f} M parameters, {unpruned['latency_ms']:.0f} ms for"
        f" {unpruned['timed_images']} images; latency against itself {noise}.\n",
        "| criterion | budget | mAP | loss | mAP50 | FLOPs | params | latency | removed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in average_seeds(row for row in rows if row["criterion"] != "none"):
        spread = f" ± {row['spread'] / 2:.3f}" if row["seeds"] > 1 else ""
        quartiles = f" [{row['latency_ratio_low']:.2f}, {row['latency_ratio_high']:.2f}]" if row["seeds"] == 1 else ""
        cells = (
            row["criterion"],
            f"{row['budget']:.0%}",
            f"{row['mAP']:.3f}{spread}",
            f"{unpruned['mAP'] - row['mAP']:.3f}",
            f"{row['mAP50']:.3f}",
            f"−{1 - row['flops'] / unpruned['flops']:.1%}",
            f"−{1 - row['params'] / unpruned['params']:.1%}",
            f"{row['latency_ratio']:.2f}{quartiles}",
            ", ".join(row["regions"]) if row["seeds"] == 1 else "differs by seed",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_summary(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Render the mean mAP over models and budgets, by criterion."""
    averaged = [row for model in models for row in average_seeds(row for row in rows if row["model"] == model)]
    found = {(row["model"], row["criterion"], row["budget"]): row["mAP"] for row in averaged}
    whole = {model: found[model, "none", 0.0] for model in models}
    budgets = sorted({row["budget"] for row in rows} - {0.0})
    criteria = [name for name in dict.fromkeys(row["criterion"] for row in rows) if name != "none"]
    head = "| criterion | mean mAP | " + " | ".join(f"loss at {b:.0%}, mean (worst)" for b in budgets) + " |"
    lines = ["\n## Over all models\n", head, "|---|--:|" + "--:|" * len(budgets)]
    for name in criteria:
        cells, everything = [], []
        for budget in budgets:
            losses = [whole[m] - found[m, name, budget] for m in models if (m, name, budget) in found]
            everything += [found[m, name, budget] for m in models if (m, name, budget) in found]
            cells.append(f"{mean(losses):.3f} ({max(losses):.3f})" if losses else "-")
        lines.append(f"| {name} | {mean(everything):.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_agreement(regions: Sequence[Row]) -> str:
    """Render Spearman's rank correlation of each criterion's scores with the mAP lost without each region alone."""
    models = list(dict.fromkeys(row["model"] for row in regions))
    criteria = [name for name in STYLES if any(name in row["scores"] for row in regions)]
    lines = ["\n## Rank agreement with the mAP drop of each region alone (all regions / blocks)\n",
             "| model | regions | " + " | ".join(criteria) + " |", "|---|--:|" + "--:|" * len(criteria)]  # fmt: skip
    for model in models:
        own = [row for row in regions if row["model"] == model]
        cells = []
        for name in criteria:
            scored = [row for row in own if name in row["scores"]]
            cells.append(
                f"{format_agreement(scored, name)} / {format_agreement([row for row in scored if row['block']], name)}"
            )
        lines.append(f"| {model} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_agreement(rows: Sequence[Row], criterion: str) -> str:
    """Format Spearman's rho; a dash if all values are equal or there are fewer than three."""
    drops, scores = [row["mAP_drop"] for row in rows], [row["scores"][criterion] for row in rows]
    if len(rows) < 3 or np.ptp(drops) == 0 or np.ptp(scores) == 0:
        return "–"
    return f"{spearmanr(drops, scores).statistic:.2f}"


def draw(rows: Sequence[Row], model: str) -> None:
    """Draw mAP over relative latency, a line per criterion."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = model
    from matplotlib import pyplot as plt

    (unpruned,) = (row for row in rows if row["criterion"] == "none")
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    averaged = average_seeds(rows)
    axes.axvspan(unpruned["floor_low"], unpruned["floor_high"], color="0.9", label="unpruned against itself")
    for name in dict.fromkeys(row["criterion"] for row in averaged if row["criterion"] != "none"):
        points: list[Any] = [unpruned, *(row for row in averaged if row["criterion"] == name)]
        colour, dash, marker = STYLES.get(name, ("#009e73", "-", "*"))
        axes.plot([p["latency_ratio"] for p in points], [p["mAP"] for p in points], dash, color=colour, marker=marker,
                  markersize=5, label=name)  # fmt: skip
    axes.set(
        xlabel="latency, unpruned = 1 (faster to the right)",
        ylabel="mAP",
        title=model,
        ylim=(-0.02, unpruned["mAP"] * 1.08),
    )
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper", frameon=False)
    figure.savefig(RESULTS / f"paper_{model}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
