"""Tests of `bench_healed_peers`: healed blocks compared with fine-tuned channels at equal time."""

from __future__ import annotations

import itertools
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from benchmarks import bench_deeper, results
from benchmarks.peers import bench_healed_peers
from benchmarks.subjects import TWIN, UNPRUNED, Latencies, Subject
from benchmarks.tests.tiny_subject import make_items, make_subject, needs_peer
from benchmarks.training.finetune import FineTuning, finetune_for
from fxprune.profiling.flops_params import count_params
from fxprune.profiling.interleaved_timing import Timing
from fxprune.search.plan_search import DEFAULT_TRIES

pytestmark = pytest.mark.filterwarnings("ignore:after healing:fxprune.FxpruneWarning")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for module in (bench_deeper, bench_healed_peers):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))


def test_finetune_for_stops_at_its_time_limit_and_changes_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    lr_scales, step = [], FineTuning.step

    def noted(self: FineTuning, index: int, number: int, lr_scale: float = 1.0) -> None:
        lr_scales.append(lr_scale)
        step(self, index, number, lr_scale)

    monkeypatch.setattr(FineTuning, "step", noted)
    ticks = itertools.count()
    subject = make_subject()
    batches = fxprune.batches(subject.model, make_items(4), batch_size=2)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    seen: list[torch.Tensor] = []
    for model in finetune_for(6.0, subject.model, batches, 1e-3, looks=3, clock=lambda: float(next(ticks))):
        assert not model.training
        assert len(lr_scales) == 2 * len(seen) + 2  # a step takes one second of this clock, a look comes every two
        seen.append(model.get_parameter("head.weight").detach().clone())
    assert lr_scales == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


def by_weights(self: Subject, models: Mapping[str, nn.Module], rounds: int, images: int) -> Latencies:
    """As though a model took the longer the more weights it has."""
    versions = {UNPRUNED: self.model, TWIN: self.model, **models}
    return Latencies({name: Timing(name, (float(count_params(model)),) * rounds) for name, model in versions.items()})


def test_bench_deeper_heals_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, healed = make_subject(), []
    heal = fxprune.heal

    def noted(*args: Any, **options: Any) -> nn.Module:
        healed.append(args[3])
        return heal(*args, **options)

    monkeypatch.setattr(fxprune, "heal", noted)
    monkeypatch.setattr(bench_deeper, "load_subjects", lambda options: [subject])
    monkeypatch.setattr(Subject, "unlabelled_batches", Subject.batches)
    asked = ["tiny", "--strategies", "one_shot", "--heals", "affine", "mimic", "--steps", "2", "--budgets", ".2", ".21"]
    bench_deeper.main(asked)
    monkeypatch.setattr(bench_deeper, "find_plans", None)  # nor are its plans looked for again
    bench_deeper.main(asked)
    bench_deeper.main(["tiny", "--strategies", "one_shot", "--heals", "none", "--steps", "2", "--budgets", ".2"])
    assert healed == ["affine", "mimic", "none"]
    *rows, last = results.read_rows("bench_deeper")
    assert all(last[key] == rows[0][key] for key in ("regions", "flops_cut", "search_seconds"))
    assert [(row["budget"], row["heal"]) for row in rows] == [
        (0.2, "affine"),
        (0.2, "mimic"),
        (0.21, "affine"),
        (0.21, "mimic"),
    ]
    assert rows[0]["regions"] == rows[2]["regions"]
    known = bench_deeper.rebuild_plans(subject, "one_shot", 0.2, Namespace(cost="flops", tries=DEFAULT_TRIES))
    assert known
    ((plan,), _) = known
    assert 1 - plan.after.flops / plan.before.flops == rows[0]["flops_cut"]
    assert rows[1]["mAP"] == rows[3]["mAP"]
    places = [bench_deeper.detector_folder(row) for row in (rows[1], rows[3])]
    first, second = (fxprune.load(subject.model, place).state_dict() for place in places)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert bench_deeper.find_same_cut(rows[1]) == rows[1]
    shutil.rmtree(places[0])
    assert bench_deeper.find_same_cut(rows[1]) == rows[3]
    shutil.rmtree(places[1])
    assert bench_deeper.find_same_cut(rows[1]) is None  # what was kept is lost: to be healed again


def test_rows_of_an_older_healing_are_marked_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject()
    monkeypatch.setattr(bench_deeper, "load_subjects", lambda options: [subject])
    monkeypatch.setattr(Subject, "unlabelled_batches", Subject.batches)
    asked = ["tiny", "--strategies", "one_shot", "--heals", "none", "affine", "--budgets", ".2"]
    bench_deeper.main(asked)
    none, affine = results.read_rows("bench_deeper")
    del none["saliency"], affine["saliency"]
    results.write_all("bench_deeper", [none, affine | {"mAP": affine["unpruned_mAP"] - 0.125}])
    (line,) = list(bench_deeper.render_table(results.read_rows("bench_deeper")))[2:]
    assert line.count("†") == 1
    assert "0.125†" in line
    bench_deeper.main(asked)
    assert [row["heal"] for row in results.read_rows("bench_deeper")] == ["none", "affine", "affine"]
    (line,) = list(bench_deeper.render_table(results.read_rows("bench_deeper")))[2:]
    assert "†" not in line
    monkeypatch.setattr(bench_deeper, "is_older", lambda row: True)  # and what an older row removed is not healed again
    bench_deeper.main(asked)
    assert results.read_rows("bench_deeper")[-1]["mAP"] == affine["mAP"]


@needs_peer
def test_main_compares_healed_models_with_peers_of_equal_latency(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject, given = make_subject(), ["tiny", "--rounds", "2", "--timed-images", "2", "--learning-rates", "1e-3"]
    for module in (bench_deeper, bench_healed_peers):
        monkeypatch.setattr(module, "load_subjects", lambda options: [subject])
    monkeypatch.setattr(Subject, "time_beside", by_weights)
    # From images alone the model is not recognized as a detector.
    monkeypatch.setattr(Subject, "unlabelled_batches", Subject.batches)
    bench_healed_peers.main(given)
    assert "bench_deeper has kept none" in capsys.readouterr().err
    bench_deeper.main(
        ["tiny", "--budgets", ".2", "--strategies", "one_shot", "--heals", "none", "mimic", "--steps", "2"]
    )
    (ours,) = [row for row in results.read_rows("bench_deeper") if row["heal"] == "mimic"]
    bench_healed_peers.main([*given, "--sweep", "0.9", "0.6", "0.02"])
    (row,) = results.read_rows("bench_healed_peers")
    assert [row[key] for key in ("strategy", "cost", "budget", "mAP")] == ["one_shot", "flops", 0.2, ours["mAP"]]
    assert row["seconds"] == ours["search_seconds"] + ours["heal_seconds"]
    assert (row["peer_ratio"], row["peer_latency_ratio"] <= row["latency_ratio"]) == (0.6, True)
    assert set(row["looks"]) == {"as pruned", *(f"0.001, look {look}" for look in (1, 2, 3, 4))}
    assert row["peer_mAP"] == max(row["looks"].values()) >= row["peer_pruned_mAP"]
    for other in (["--budgets", ".3"], ["--costs", "latency"]):  # of which there is nothing: what there is stays
        bench_healed_peers.main([*given, *other])
    assert results.read_rows("bench_healed_peers") == [row]
    (line,) = (tmp_path / "healed_peers.md").read_text().splitlines()[2:]
    assert line.startswith("| tiny | one_shot, mimic | 20% flops | ")
    again = ours | {"mAP": 0.25, "heal_seconds": 7.0, "search_seconds": 1.0}  # healed anew since
    (line,) = list(bench_healed_peers.render_table([row], [again]))[2:]
    assert " | 0.250 | 8 | " in line
    assert f" | {row['peer_mAP']:.3f} | {row['seconds']:.0f} | " in line
    elsewhere = again | {"regions": [["another"]]}
    (line,) = list(bench_healed_peers.render_table([row], [elsewhere]))[2:]
    assert " | 0.250 | 8 | " not in line


def test_render_table_names_peers_that_fail_or_are_never_fast_enough() -> None:
    shared = {"model": "m", "strategy": "search", "heal": "mimic", "seconds": 9.0, "mAP": 0.5, "latency_ratio": 0.8}
    shared |= {"latency_ratio_low": 0.7, "latency_ratio_high": 0.9, "cost": "latency", "error": None}
    rows = [shared | {"budget": 0.2}, shared | {"budget": 0.3, "error": "ValueError: no"}]
    first, second = list(bench_healed_peers.render_table(rows, []))[2:]
    assert first.startswith("| m | search, mimic | 20% latency | 0.80 [0.70, 0.90] | 0.500 | 9 | never")
    assert "| fails |" in second
