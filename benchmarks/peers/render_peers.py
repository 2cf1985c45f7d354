"""Render the tables of `benchmarks.peers.bench_peers` to ``results/peers.md``.

python -m benchmarks.peers.render_peers
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import pairwise

from benchmarks.results import RESULTS, Row, read_rows
from fxprune.profiling.interleaved_timing import median_error

LEVEL_MAP = 0.005
"""Differences in mAP up to this count as level."""
MAX_UNCERTAINTY = 0.05
"""Latencies are compared only if the unpruned model's ratio to itself is known this well."""
HEALS = {"none": "as pruned", "finetune": "fine-tuned"}
TOOLS = ("fxprune", "torch-pruning")
SUMMARY_CRITERIA = ("fisher", "ablation")
"""Criteria that the summary compares with the peer."""

Point = tuple[float, float]
"""Latency as a ratio to the unpruned model, and mAP."""


def main(argv: list[str] | None = None) -> None:
    """Write the tables."""
    argparse.ArgumentParser(description="Tables of what bench_peers measured.").parse_args(argv)
    rows = read_rows("bench_peers")
    models = list(dict.fromkeys(row["model"] for row in rows))
    parts = ["# Removing blocks or channels\n", render_summary(rows, models)]
    for model in models:
        own = [row for row in rows if row["model"] == model]
        parts += [render_heading(own), render_cuts(own), render_latencies(own), render_failures(own)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "peers.md").write_text("\n".join(parts), encoding="utf-8")


def render_heading(rows: Sequence[Row]) -> str:
    """Render a model's heading: its scores unpruned, and after fine-tuning alone."""
    first = find_unpruned(rows, "none")
    warning = "" if is_measurable(first) else " **Too noisy to compare latencies.**"
    noise = f"{first['floor']:.3f} ± {floor_uncertainty(first):.3f} (median of {first['rounds']} rounds, 95 %)"
    tuned = [row for row in rows if row["kind"] == "unpruned" and row["heal"] == "finetune"]
    also = f" (fine-tuned on {tuned[0]['finetune_images']} images: {format_score(tuned[0]['mAP'])})" if tuned else ""
    return (
        f"\n## {first['model']}\n\nUnpruned: mAP {format_score(first['mAP'])}{also}, {first['flops'] / 1e9:.2f}"
        " GFLOPs a batch,"
        f" {first['params'] / 1e6:.1f} M parameters, {first['latency_ms']:.0f} ms for {first['timed_images']} images;"
        f" latency against itself {noise}; {first['val_images']} val images.{warning}\n"
    )


def find_unpruned(rows: Iterable[Row], heal: str) -> Row:
    """Find the row of the unpruned model, as it is or fine-tuned."""
    return next(row for row in rows if row["kind"] == "unpruned" and row["heal"] == heal)


def format_score(value: float | None) -> str:
    """Format an mAP; a dash if there is none."""
    return "–" if value is None else f"{value:.3f}"


def render_cuts(rows: Sequence[Row]) -> str:
    """Render every method at every budget; the peer's cuts save as many FLOPs as ours, as nearly as it can."""
    first = find_unpruned(rows, "none")
    lines = ["| budget | method | FLOPs | params | mAP | fine-tuned | latency | call |",
             "|--:|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    cuts = [row for row in rows if row["kind"] == "cut"]
    for row in sorted((row for row in cuts if row["heal"] == "none"), key=lambda row: float(row["budget"])):
        tuned = find_cut(cuts, row["method"], row["budget"], "finetune")
        cells = (
            f"{row['budget']:.0%}",
            row["method"],
            f"−{1 - row['flops'] / first['flops']:.1%}",
            f"−{1 - row['params'] / first['params']:.1%}",
            format_score(row["mAP"]),
            format_score(tuned["mAP"] if tuned else None),
            f"{row['latency_ratio']:.2f} [{row['latency_ratio_low']:.2f}, {row['latency_ratio_high']:.2f}]",
            f"{row['seconds']:.1f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def is_measurable(row: Row) -> bool:
    """Whether the unpruned model's latency over itself is 1, to within a small uncertainty."""
    return bool(abs(row["floor"] - 1) <= floor_uncertainty(row) <= MAX_UNCERTAINTY)


def floor_uncertainty(row: Row) -> float:
    """Half of the 95 % interval of the median of the unpruned model's latency over itself."""
    return median_error(row["floor_low"], row["floor_high"], row["rounds"])


def find_cut(rows: Iterable[Row], method: str, budget: float, heal: str) -> Row | None:
    """Find the row of a method's cut to a budget."""
    return next((row for row in rows if (row["method"], row["budget"], row["heal"], row["kind"])
                 == (method, budget, heal, "cut")), None)  # fmt: skip


def latency_curve(rows: Iterable[Row], method: str, heal: str) -> list[Point]:
    """Make a method's curve of latency and mAP, from the unpruned model to the deepest cut; empty if it has no cut."""
    own = [row for row in rows if row["method"] == method and row["kind"] in ("cut", "sweep") and row["heal"] == heal]
    own = [row for row in own if row["mAP"] is not None]
    ordered = sorted(own, key=lambda row: -float(row["flops"]))
    return [(row["latency_ratio"], row["mAP"]) for row in ([find_unpruned(rows, heal), *ordered] if own else [])]


def best_map_at(points: Sequence[Point], latency: float) -> float | None:
    """Find the best mAP of a method at a latency or below, by linear interpolation; None if it is never that fast.

    Faster points count as well. Where a curve is not monotonic, this is in favour of the method.

    Parameters
    ----------
    points : sequence
        Latency and mAP, in the order of the cuts.
    latency : float
        Largest latency allowed.
    """
    found = [mAP for own, mAP in points if own <= latency]
    for (before, start), (after, end) in pairwise(points):
        if min(before, after) < latency < max(before, after):
            found.append(start + (end - start) * (latency - before) / (after - before))
    return max(found, default=None)


def list_peers(rows: Iterable[Row]) -> list[str]:
    """List the peer's methods in the rows, in order."""
    return list(dict.fromkeys(row["method"] for row in rows if row["method"].startswith(TOOLS[1])))


def render_latencies(rows: Sequence[Row]) -> str:
    """Render for each of our cuts the mAP of each of the peer's methods at that latency."""
    peers = list_peers(rows)
    lines = [
        "At the latency of each of our cuts (mAP as pruned / fine-tuned; *: within chance of the unpruned model):\n",
        "| budget | method | latency | mAP | " + " | ".join(peers) + " |",
        "|--:|---|--:|--:|" + "--:|" * len(peers),
    ]
    ours = [row for row in rows if row["kind"] == "cut" and row["method"].startswith(TOOLS[0])]
    for row in (row for row in ours if row["heal"] == "none"):
        tuned = find_cut(ours, row["method"], row["budget"], "finetune")
        cells = [" / ".join([format_score(row["mAP"]), *([format_score(tuned["mAP"])] if tuned else [])])]
        for peer in peers:
            heals = ["none", *(["finetune"] if tuned else [])]
            cells.append(
                " / ".join(format_kept(latency_curve(rows, peer, heal), row["latency_ratio"]) for heal in heals)
            )
        star = "*" if row["latency_ratio"] >= 1 - floor_uncertainty(row) else ""
        lines.append(
            f"| {row['budget']:.0%} | {row['method']} | {row['latency_ratio']:.2f}{star} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def format_kept(points: Sequence[Point], latency: float) -> str:
    """Format the mAP of a curve at a latency as a table cell."""
    if not points:
        return "fails"
    value = best_map_at(points, latency)
    return "never that fast" if value is None else format_score(value)


def render_failures(rows: Sequence[Row]) -> str:
    """Render the failures with their error messages; equal messages once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["error"]:
            where = [row["method"]] + [f"{key} {row[key]}" for key in ("budget", "ratio") if row[key] is not None]
            where += [HEALS["finetune"]] if row["heal"] == "finetune" else []
            found.setdefault((row["way"] or "", row["error"]), []).append(" ".join(where))
    if not found:
        return ""
    worked = list(dict.fromkeys(row["way"] for row in rows if row["kind"] in ("cut", "sweep") and row["way"]))
    lines = [f"- {way + ': ' if way else ''}`{error}` ({'; '.join(who)})" for (way, error), who in found.items()]
    outcome = f"What worked: {', '.join(worked)}." if worked else "Nothing worked."
    return "Failures:\n\n" + "\n".join(lines) + f"\n\n{outcome}\n"


def render_summary(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Render the comparison of `SUMMARY_CRITERIA` with the best of the peer's methods, by model and cut."""
    heals = [heal for heal in HEALS if any(row["heal"] == heal for row in rows)]
    columns = [(way, heal) for heal in heals for way in ("FLOPs", "latency")]
    lines = [
        f"Our mAP against the best of Torch-Pruning's, at the FLOPs and at the latency of our cut. Differences up to"
        f" {LEVEL_MAP} count as level. A star: the latency is within chance of the unpruned model's.\n",
        "| model | budget | ours | " + " | ".join(f"same {way}, {HEALS[heal]}" for way, heal in columns) + " |",
        "|---|--:|---|" + "---|" * len(columns),
    ]
    tally: dict[tuple[str, str, str], list[str]] = {}
    for model in models:
        own = [row for row in rows if row["model"] == model]
        for row in own:
            if row["kind"] != "cut" or row["heal"] != "none" or row["method"].split()[-1] not in SUMMARY_CRITERIA:
                continue
            cells = []
            for way, heal in columns:
                winner, cell = compare(own, row, way, heal)
                tally.setdefault((row["method"], way, heal), []).append(winner)
                cells.append(cell)
            lines.append(f"| {model} | {row['budget']:.0%} | {row['method'].split()[-1]} | {' | '.join(cells)} |")
    counted = [
        f"- `{method.split()[-1]}`, same {way}, {HEALS[heal]}: ours ahead {found.count('ours')}, level"
        f" {found.count('level')}, Torch-Pruning ahead {found.count('theirs')},"
        f" too noisy {found.count('unmeasured')}, of {len(found)}"
        for (method, way, heal), found in tally.items()
    ]
    return "\n".join([*lines, "", *counted, ""])


def compare(rows: Sequence[Row], row: Row, way: str, heal: str) -> tuple[str, str]:
    """Compare the mAP of one of our cuts with the peer's best.

    Parameters
    ----------
    way : str
        ``FLOPs`` or ``latency``: what is equal.

    Returns
    -------
    winner : str
        ``ours``, ``level``, ``theirs`` or ``unmeasured``.
    cell : str
        Both scores, the better one bold.
    """
    if way == "latency" and not is_measurable(row):
        return "unmeasured", "too noisy"
    own = find_cut(rows, row["method"], row["budget"], heal)
    mAP = own["mAP"] if own else None
    peers = list_peers(rows)
    if way == "FLOPs":
        found = [find_cut(rows, peer, row["budget"], heal) for peer in peers]
        values = {peer: other["mAP"] for peer, other in zip(peers, found, strict=True) if other}
    else:
        values = {peer: best_map_at(latency_curve(rows, peer, heal), row["latency_ratio"]) for peer in peers}
    reached = {peer: value for peer, value in values.items() if value is not None}
    star = "*" if way == "latency" and row["latency_ratio"] >= row["floor_low"] else ""
    if mAP is None:
        return "theirs" if reached else "level", "–"
    if not reached:
        works = any(latency_curve(rows, peer, heal) for peer in peers)
        return "ours", f"**{format_score(mAP)}**{star} : {'never that fast' if works else 'fails'}"
    peer, best = max(reached.items(), key=lambda item: item[1])
    name = peer.removeprefix(TOOLS[1]).strip()
    if abs(mAP - best) <= LEVEL_MAP:
        return "level", f"{format_score(mAP)}{star} : {format_score(best)} ({name})"
    if mAP > best:
        return "ours", f"**{format_score(mAP)}**{star} : {format_score(best)} ({name})"
    return "theirs", f"{format_score(mAP)}{star} : **{format_score(best)}** ({name})"


if __name__ == "__main__":
    main()
