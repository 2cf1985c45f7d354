"""Several processes: all get the result of one process, and an error in one is raised in all."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_map

import fxprune
from fxprune.attribution.recorder import AttributionRecord, merge_records
from fxprune.demo.bundled import load_dataset, load_detector
from tests.helpers import processes
from tests.helpers.processes import Job, analyze, heal, prune
from tests.helpers.readme import README, blocks_under

pytestmark = pytest.mark.distributed

ANALYSES: dict[str, Job] = {
    "fisher": analyze,
    "mended": partial(analyze, criterion="fisher_mended"),
    "a generator": partial(analyze, loader=processes.one_by_one),
    "some labels": partial(analyze, loader=processes.partly_labelled),
}
HEALINGS: dict[str, Job] = {
    "affine": partial(heal, method="affine"),
    "affine by rows": processes.heal_by_rows,
    "mimic": partial(heal, method="mimic", steps=10),
    "labelled": partial(heal, method="mimic_labelled", steps=10),
}
JOBS: dict[str, Job] = {
    **ANALYSES,
    **HEALINGS,
    "search": partial(prune, budget=0.4, strategy="search", tries=3, heal="affine"),
    "stopped early": processes.stop_early,
    "distance": processes.measure_distance,
    "agreement": processes.measure_agreement,
    "milliseconds": partial(analyze, latency_backend="eager"),
}
FEW = "2 batches cannot be shared by 3 processes; give more, or start fewer"
OTHER = "the processes hold different batches; give all the same loader"
BAD: dict[str, tuple[Job, int | None, str]] = {
    "too few to analyze": (partial(analyze, loader=processes.two_batches), None, f"BatchError: {FEW}"),
    "too few to heal": (partial(heal, method="affine", loader=processes.two_batches), None, f"BatchError: {FEW}"),
    "small batches": (
        partial(heal, method="mimic", loader=processes.small_last),
        None,
        "BatchError: batch 3: its 1 images cannot be shared by 3 processes; give larger batches",
    ),
    "one cannot analyze": (partial(analyze, loader=processes.four_channels), 1, "BatchError: batch 1: the classifier"),
    "one cannot score": (partial(analyze, criterion=processes.broken_criterion), 2, "KeyError: 'blocks.1'"),
    "one cannot heal": (processes.fit_unlooked, 1, "RuntimeError: Given groups=1, weight of size [8, 3, 3, 3]"),
    "none can heal": (
        partial(heal, method="affine", loader=processes.four_channels),
        None,
        "RuntimeError: Given groups=1, weight of size [8, 3, 3, 3]",
    ),
    "not all labelled": (
        partial(heal, method="mimic_labelled", loader=processes.partly_labelled),
        None,
        "BatchError: batch 1 has no labels",
    ),
    "one cannot read": (partial(analyze, loader=processes.broken_disk), 1, "OSError: the disk is gone"),
    "the first cannot decide": (processes.fail_alone, 0, "SettingError: it is Monday"),
    "other batches": (partial(analyze, loader=processes.each_its_own), None, f"BatchError: {OTHER}"),
    "other batches to heal": (
        partial(heal, method="affine", loader=processes.each_its_own),
        None,
        f"BatchError: {OTHER}",
    ),
    "more batches": (
        partial(analyze, loader=processes.more_for_the_first),
        None,
        "BatchError: the processes read 5, 4, 3 batches; give all the same loader",
    ),
    "other weights": (processes.analyze_own_model, None, "ModelError: the processes hold Tiny with different weights"),
}
"""Job, the process that fails at it (None: all do), how the error begins."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process gets."""
    return processes.do_jobs(JOBS, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several gets."""
    return processes.run_jobs(JOBS, request.param, tmp_path_factory.mktemp("together"))


def assert_close(given: dict[str, Tensor], wanted: dict[str, Tensor], relative: float) -> None:
    assert given.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (given[key] - value).double().norm() <= relative * value.double().norm(), key


def plain(found: Any) -> Any:
    """Tensors as numbers, to be compared bit for bit."""
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, found)


# What one gets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_all_ranks_get_equal_results_bit_for_bit(name: str, together: list[dict[str, Any]]) -> None:
    assert not isinstance(together[0][name], str), together[0][name]
    assert all(plain(other[name]) == plain(together[0][name]) for other in together)


@pytest.mark.parametrize("name", ANALYSES)
def test_distributed_analysis_equals_analysis_of_one_process(
    name: str, together: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    given, wanted = together[0][name], alone[name]
    assert (given["settings"]["batches"], given["settings"]["images"]) == (5, 19)
    for kind, number in (("regions", "score"), ("nodes", "grad_act")):
        for row, other in zip(given[kind], wanted[kind], strict=True):
            assert row[number] == (other[number] and pytest.approx(other[number], rel=1e-6, abs=1e-9))
            assert {**row, number: 0} == {**other, number: 0}
    assert {**given, "regions": [], "nodes": []} == {**wanted, "regions": [], "nodes": []}


def test_target_source_is_known_to_all_ranks(together: list[dict[str, Any]]) -> None:
    words = "labels given for some batches, the model's own confident outputs for the rest"
    assert {found["some labels"]["settings"]["targets"] for found in together} == {words}


@pytest.mark.parametrize(
    ("name", "relative"), [("affine", 1e-6), ("affine by rows", 1e-6), ("mimic", 1e-5), ("labelled", 1e-5)]
)
def test_distributed_heal_equals_heal_of_one_process(
    name: str, relative: float, together: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert_close(together[0][name], alone[name], relative)


def test_distributed_search_equals_search_of_one_process(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    (plans, state), (wanted_plans, wanted) = together[0]["search"], alone["search"]
    assert [removed(plan) for plan in plans] == [removed(plan) for plan in wanted_plans]
    increases = [[plan["settings"]["loss_increase"] for plan in found] for found in (plans, wanted_plans)]
    assert increases[0] == pytest.approx(increases[1], rel=1e-4)
    assert_close(state, wanted, 1e-5)


def removed(plan: dict[str, Any]) -> list[str]:
    return [region["name"] for region in plan["regions"] if region["removed"]]


def test_distributed_mimic_stops_like_one_process(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    (steps, state), (wanted_steps, wanted) = together[0]["stopped early"], alone["stopped early"]
    assert steps == wanted_steps == [*range(1, 13)]
    assert_close(state, wanted, 1e-6)


def test_distributed_feature_distance_equals_one_process(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert together[0]["distance"] == pytest.approx(alone["distance"], rel=1e-6)
    assert together[0]["agreement"] == pytest.approx(alone["agreement"], rel=1e-6)
    assert alone["agreement"] > 0


def test_latency_is_that_of_rank_zero(together: list[dict[str, Any]]) -> None:
    assert together[-1]["milliseconds"]["before"]["latency_ms"] is not None


def test_merge_records_weighs_by_images() -> None:
    one, other = (
        AttributionRecord({("", "a"): 3.0}, images=1),
        AttributionRecord({("", "a"): 1.0, ("", "b"): 4.0}, images=3),
    )
    assert merge_records([one, other]).grad_act == {("", "a"): 1.5, ("", "b"): 3.0}


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_ranks_fail_together_and_can_go_on(tmp_path: Path) -> None:
    jobs = {**{name: job for name, (job, _, _) in BAD.items()}, "all is well again": analyze}
    found = processes.run_jobs(jobs, 3, tmp_path)
    for name, (_, culprit, text) in BAD.items():
        for rank, results in enumerate(found):
            expected = text if culprit in (None, rank) else _told(text, culprit)
            assert str(results[name]).startswith(expected), (name, rank, results[name])
    assert {results["all is well again"]["settings"]["images"] for results in found} == {19}


def _told(text: str, culprit: int | None) -> str:
    """How the others begin to say what one of them failed at."""
    kind, message = text.split(": ", 1)
    if hasattr(fxprune.errors, kind):
        return f"{kind}: process {culprit}: {message}"
    return f"FxpruneError: process {culprit}: {text}"


@pytest.mark.filterwarnings("ignore:after healing:fxprune.FxpruneWarning")
@pytest.mark.slow
def test_readme_recipe_for_several_processes_works(tmp_path: Path) -> None:
    (program,) = blocks_under("## Several processes", README.read_text(encoding="utf-8"))
    (tmp_path / "prune.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "prune.py"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fxprune removed 4 of 31 candidates") == 1
    alone = fxprune.compile(load_detector(), _loader(), 0.2, heal="affine")
    assert_close(fxprune.load(load_detector(), tmp_path / "pruned").state_dict(), alone.state_dict(), 1e-5)


def _loader() -> Any:
    return fxprune.batches(load_detector(), load_dataset("calibration"), batch_size=8)
