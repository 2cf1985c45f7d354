"""Tests of `bench_peers`: channel pruning, the search for its ratio, fine-tuning, and the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from benchmarks import results
from benchmarks.peers import bench_peers, render_peers, retime_peers
from benchmarks.peers.channels import (
    FLOPS_TOLERANCE,
    PeerError,
    Settings,
    check_pruned,
    find_ratio,
    first_working_way,
    prune_channels,
)
from benchmarks.peers.handover import WAYS, Prepared, count_inference_flops, is_c2f, prepare, rewrite_c2f_blocks
from benchmarks.subjects import Subject
from benchmarks.tests.tiny_subject import Tiny, make_items, make_subject, needs_peer
from benchmarks.training.finetune import finetune
from fxprune.profiling.flops_params import count_params


@pytest.fixture(autouse=True)
def results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(render_peers, "RESULTS", tmp_path)
    return tmp_path


def working(subject: Subject, settings: Settings) -> Prepared:
    prepared, failures = first_working_way(subject.model, subject.batches(), settings)
    assert prepared is not None, failures
    return prepared


@needs_peer
@pytest.mark.parametrize("settings", [Settings("taylor"), Settings("magnitude"), Settings("taylor", round_to=8)])
def test_prune_channels_reaches_the_target_flops_and_keeps_output_shapes(settings: Settings) -> None:
    subject = make_subject()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    prepared = working(subject, settings)
    assert prepared.outputs == ("head",)

    def share_at(ratio: float) -> float:
        model, _ = prune_channels(prepared, settings, ratio)
        return 1 - count_inference_flops(model, prepared.adapter, prepared.example) / prepared.flops

    share = share_at(find_ratio(0.3, share_at, {}))
    assert share == pytest.approx(0.3, abs=0.15 if settings.round_to else 0.03)
    model, _ = prune_channels(prepared, settings, 0.3)
    assert model.get_submodule("head").out_channels == 5
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    widths = {layer.out_channels for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    assert widths - {5, 48}
    assert settings.round_to is None or all(width % 8 == 0 for width in widths - {5})
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


def test_find_ratio_stops_at_the_target_and_avoids_failures() -> None:
    def share_at(ratio: float) -> float | None:
        return ratio**2 if ratio < 0.6 else None

    assert find_ratio(0.25, share_at, {}) ** 2 == pytest.approx(0.25, abs=FLOPS_TOLERANCE)
    assert find_ratio(0.9, share_at, {0.1: 0.01}) == pytest.approx(0.6, abs=0.01)
    asked: list[float] = []
    assert find_ratio(0.25, asked.append, {0.2: 0.04, 0.5: 0.251, 0.7: 0.4}) == 0.5
    assert not asked
    with pytest.raises(PeerError, match="no pruning ratio"):
        find_ratio(0.3, lambda ratio: None, {})


def test_check_pruned_refuses_other_output_shapes() -> None:
    subject = make_subject()
    prepared = prepare(subject.model, subject.batches(), WAYS[0])
    with pytest.raises(PeerError, match="no FLOPs"):
        check_pruned(prepared, prepared.model)
    other = Tiny()
    other.head = nn.Conv2d(48, 6, 1)
    with pytest.raises(PeerError, match=r"head .*\(6, 12, 12\).*\(5, 12, 12\)"):
        check_pruned(prepared, other.eval())


def few(*more: str) -> Any:
    given = ["--criteria", "fisher", "--peers", "taylor", "--budgets", "0.2", "--sweep", "0.4", "--rounds", "1",
             "--timed-images", "2", *more]  # fmt: skip
    return bench_peers.make_parser().parse_args(given)


@needs_peer
def test_main_writes_all_rows_and_tables(results_folder: Path) -> None:
    subject = make_subject()
    training = fxprune.batches(subject.model, make_items(4), batch_size=2)
    rows = bench_peers.compare(subject, few("--finetune-images", "4"), training)
    found = [(row["method"], row["kind"], row["heal"]) for row in rows]
    ours, peer = "fxprune fisher", "torch-pruning taylor"
    assert sorted(found) == sorted(
        (method, kind, heal)
        for heal in ("none", "finetune")
        for method, kind in (("unpruned", "unpruned"), (ours, "cut"), (peer, "sweep"), (peer, "cut"))
    )
    flops = {row["method"]: row["flops"] for row in rows if row["kind"] != "sweep"}
    assert flops[ours] <= 0.8 * flops["unpruned"]
    assert flops[peer] == pytest.approx(flops[ours], abs=0.03 * flops["unpruned"])
    assert all(row["error"] is None and row["seconds"] is not None and set(row) == set(rows[0]) for row in rows)
    results.replace_rows("bench_peers", "tiny", rows)
    render_peers.main([])
    text = (results_folder / "peers.md").read_text()
    assert f"| 20% | {ours} | −" in text
    assert "same FLOPs, fine-tuned: ours ahead" in text
    again = retime_peers.retime(subject, rows, rounds=2, images=2)
    for row, timed in zip(rows, again, strict=True):
        assert {key for key in row if row[key] != timed[key]} <= {
            "latency_ratio", "latency_ratio_low", "latency_ratio_high", "latency_ms",
            "floor", "floor_low", "floor_high", "rounds",
        }  # fmt: skip
        assert timed["rounds"] == 2
    made = retime_peers.rebuild_versions(subject, rows)
    assert {key: count_params(model) for key, model in made.items()} == {
        retime_peers.version_key(row): row["params"] for row in rows if row["kind"] != "unpruned"
    }


@needs_peer
def test_failing_peer_becomes_a_row_with_its_error(results_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_pruning as tp

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("modulo by zero\nand more")

    monkeypatch.setattr(tp.pruner.BasePruner, "step", fail)
    rows = bench_peers.compare(make_subject(), few(), [])
    failed = [row for row in rows if row["kind"] == "failed"]
    assert {row["error"] for row in failed} == {"ZeroDivisionError: modulo by zero"}
    assert [row["way"] for row in failed] == [way.name for way in WAYS if not way.unsplit]
    assert {row["method"] for row in rows if row["kind"] == "cut"} == {"fxprune fisher"}
    results.replace_rows("bench_peers", "tiny", rows)
    render_peers.main([])
    text = (results_folder / "peers.md").read_text()
    assert "`ZeroDivisionError: modulo by zero`" in text
    assert "fails |" in text


def test_infeasible_budget_becomes_a_row() -> None:
    options = few()
    options.budgets, options.peers = [0.1, 0.99], []
    rows = bench_peers.compare(make_subject(), options, [])
    assert [row["budget"] for row in rows] == [0.0, 0.1, 0.99]
    assert rows[-1]["kind"] == "failed"
    assert rows[-1]["error"].startswith("BudgetError: ")


def test_finetune_changes_weights_but_not_norm_statistics() -> None:
    subject = make_subject()
    training = fxprune.batches(subject.model, make_items(4), batch_size=2)
    analysis = fxprune.analyze(subject.model, subject.batches())
    for model in (subject.model, fxprune.apply(subject.model, analysis.plan(0.1))):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        tuned, _ = finetune(model, training, 1e-3)
        assert not tuned.training
        after = tuned.state_dict()
        statistics = {name for name in after if name.rpartition(".")[2].startswith(("running_", "num_batches"))}
        assert statistics
        assert all(torch.equal(after[name], before[name]) for name in statistics)
        assert not any(torch.equal(after[name], before[name]) for name in after.keys() - statistics)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("latency", "expected"),
    [(0.95, 0.7), (0.85, 0.55), (0.9, 0.6), (0.7, None), (1.2, 0.8)],
)
def test_best_map_at_interpolates_linearly(latency: float, expected: float | None) -> None:
    points = [(1.0, 0.8), (0.9, 0.6), (0.8, 0.5)]
    kept = render_peers.best_map_at(points, latency)
    assert kept == (expected if expected is None else pytest.approx(expected))


def test_best_map_at_takes_the_best_of_non_monotonic_points() -> None:
    points = [(1.0, 0.8), (1.1, 0.7), (0.9, 0.6), (0.96, 0.4)]
    assert render_peers.best_map_at(points, 1.0) == pytest.approx(0.8)
    assert render_peers.best_map_at(points, 0.95) == pytest.approx(0.7 - 0.1 * 0.15 / 0.2)
    assert render_peers.best_map_at([], 1.0) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.98, 1.02, "ours"), (1.03, 1.05, "unmeasured"), (0.8, 1.2, "unmeasured")]
)
def test_compare_is_level_if_the_unpruned_model_differs_from_itself(low: float, high: float, expected: str) -> None:
    shared = {"heal": "none", "floor": (low + high) / 2, "floor_low": low, "floor_high": high, "rounds": 31}
    rows = [
        {"method": "unpruned", "kind": "unpruned", "budget": 0.0, "mAP": 0.8, "latency_ratio": 1.0, "flops": 100},
        {"method": "fxprune fisher", "kind": "cut", "budget": 0.1, "mAP": 0.7, "latency_ratio": 0.8, "flops": 90},
        {"method": "torch-pruning taylor", "kind": "cut", "budget": 0.1, "mAP": 0.7, "latency_ratio": 0.9, "flops": 90},
    ]
    full = [row | shared for row in rows]
    assert render_peers.compare(full, full[1], "latency", "none")[0] == expected
    assert render_peers.compare(full, full[1], "FLOPs", "none")[0] == "level"


def test_rewritten_c2f_blocks_give_the_same_outputs() -> None:
    from ultralytics.nn.modules import C2f

    model = nn.Sequential(nn.Conv2d(3, 8, 1), C2f(8, 16, 2, True), C2f(16, 16, 1)).eval()
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        before = model(image)
        rewrite_c2f_blocks(model)
        assert not any(is_c2f(module) for module in model.modules())
        torch.testing.assert_close(model(image), before)
