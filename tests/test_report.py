"""What a report says of a pruned model, as a value, as JSON and as a table."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import FrozenInstanceError
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import ModelError
from fxprune.report import Report, quantity


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Tiny(nn.Module):
    """A classifier of 5 classes with four removable blocks; one graph as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Detector(nn.Module):
    """Its own forward looks at values, so that `body` is captured and it stays eager around it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Tiny()

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the image is not finite")
        return self.body(x)


def pixels(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


LOADER = [(pixels(seed=1), torch.tensor([0, 3])), (pixels(seed=2), torch.tensor([4, 1])), pixels(1)]
IMAGES = 5


def build(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


def flops_of(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels(1))
    return int(counter.get_total_flops())


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(Tiny)


@pytest.fixture(scope="module")
def pruned(model: nn.Module) -> nn.Module:
    return fxprune.compile(model, LOADER, 0.3)


@pytest.fixture(scope="module")
def twice(pruned: nn.Module) -> nn.Module:
    return fxprune.compile(pruned, LOADER, 0.2, criterion="l1", cost="params")


@pytest.fixture(scope="module")
def report(pruned: nn.Module) -> Report:
    return fxprune.report(pruned)


def names(model: nn.Module) -> list[str]:
    return [region.name for region in fxprune.report(model).removed]


# The value -----------------------------------------------------------------------------------------------------------


def test_before_and_after_are_those_of_the_models(model: nn.Module, pruned: nn.Module, report: Report) -> None:
    assert (report.before.flops, report.before.params, report.before.blocks) == (flops_of(model), params_of(model), 4)
    assert (report.after.flops, report.after.params) == (flops_of(pruned), params_of(pruned))
    assert report.after.blocks == 2
    assert report.after.flops <= 0.7 * report.before.flops


def test_regions_ascend_in_score_and_say_what_went(pruned: nn.Module, report: Report) -> None:
    blocks = {f"blocks.{i}" for i in range(4)}
    assert {region.name for region in report.regions} == blocks
    scores = [region.score for region in report.regions]
    assert scores == sorted(scores)
    assert [region.removed for region in report.regions] == [True, True, False, False]
    assert report.removed == report.regions[:2]
    left = {".".join(key.split(".")[:2]) for key in pruned.state_dict() if key.startswith("blocks.")}
    assert left == blocks - {region.name for region in report.removed}


def test_rejections_have_reasons(report: Report) -> None:
    assert {rejection.name for rejection in report.rejections} == {"stem", "fc"}
    assert all("it turns" in rejection.reason for rejection in report.rejections)


def test_settings_say_how_it_was_made(report: Report) -> None:
    expected = {
        "criterion": "grad_delta",
        "budget": 0.3,
        "cost": "flops",
        "shapes": "proved",
        "seed": 0,
        "images": IMAGES,
        "batches": 3,
        "prunings": 1,
    }
    assert {key: report.settings[key] for key in expected} == expected
    assert report.settings["versions"]["torch"] == torch.__version__
    assert report.settings["versions"]["fxprune"] == fxprune.__version__


@pytest.mark.parametrize(
    ("loader", "targets"),
    [(LOADER[:2], "labels given"), (LOADER[2:], "the model's own confident outputs"), (LOADER, "some")],
    ids=["labels", "images", "both"],
)
def test_settings_say_where_targets_came_from(model: nn.Module, loader: list[Any], targets: str) -> None:
    assert targets in fxprune.report(fxprune.compile(model, loader, 0.1)).settings["targets"]


def test_a_report_cannot_be_changed(report: Report) -> None:
    with pytest.raises(FrozenInstanceError):
        report.before = report.after  # type: ignore[misc]


def test_reports_of_one_model_are_equal(pruned: nn.Module, report: Report) -> None:
    assert fxprune.report(pruned) == report
    assert fxprune.report(pruned) is not report


def test_to_dict_is_plain_data(report: Report) -> None:
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert set(data) == {"before", "after", "regions", "rejections", "settings"}
    assert data["before"] == {"flops": report.before.flops, "params": report.before.params, "blocks": 4}
    assert [row["name"] for row in data["regions"] if row["removed"]] == [r.name for r in report.removed]
    data["regions"][0]["layers"].append("harm")
    assert report.to_dict() != data


@pytest.mark.parametrize("kind", [Tiny, Detector])
@pytest.mark.parametrize("times", [1, 2])
def test_a_report_survives_copies(kind: type[nn.Module], times: int) -> None:
    pruned = fxprune.compile(build(kind), LOADER, 0.3)
    twin = pruned
    for _ in range(times):
        twin = copy.deepcopy(twin)
    assert twin is not pruned
    assert fxprune.report(twin) == fxprune.report(pruned)
    assert len(names(twin)) == 2


def test_a_report_survives_precision_and_mode(pruned: nn.Module, report: Report) -> None:
    assert fxprune.report(copy.deepcopy(pruned).half().train()) == report


# Pruned more than once -----------------------------------------------------------------------------------------------


def test_pruning_twice_adds_up(model: nn.Module, pruned: nn.Module, twice: nn.Module, report: Report) -> None:
    total = fxprune.report(twice)
    assert total.before == report.before
    assert (total.after.flops, total.after.params) == (flops_of(twice), params_of(twice))
    assert total.after.flops < report.after.flops
    assert total.after.blocks == 4 - len(total.removed) == 1
    assert set(names(pruned)) < set(names(twice))
    assert sorted(region.name for region in total.regions) == [f"blocks.{i}" for i in range(4)]
    assert [r.removed for r in total.regions].count(True) == 3


def test_pruning_twice_names_the_last_settings(twice: nn.Module, report: Report) -> None:
    settings = fxprune.report(twice).settings
    assert (settings["prunings"], settings["criterion"], settings["cost"]) == (2, "l1", "params")
    assert settings["budget"] == 0.2
    assert (report.settings["prunings"], report.settings["criterion"]) == (1, "grad_delta")
    json.dumps(fxprune.report(twice).to_dict(), allow_nan=False)


def test_pruning_again_leaves_the_first_report_as_it_was(pruned: nn.Module, twice: nn.Module, report: Report) -> None:
    assert fxprune.report(twice) != report
    assert fxprune.report(pruned) == report


def test_what_comes_back_keeps_its_name(model: nn.Module) -> None:
    """A second pruning sees the graph the first one left: names, scores and costs are of the same layers."""
    detector = build(Detector)
    once = fxprune.compile(detector, LOADER, 0.3)
    again = fxprune.compile(once, LOADER, 0.2)
    assert all(name.startswith("body.blocks.") for name in names(again))
    assert len(names(again)) == len(set(names(again))) == 3


# The table -----------------------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """Cells of a report's table of regions, by region name."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    table = [line for line in lines if len(line) == 6]
    assert len({line[1] for line in table}) == len(table)
    return {line[1]: tuple(line) for line in table}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("wide")
def test_each_region_has_a_row_and_the_removed_ones_a_mark(report: Report) -> None:
    table = rows(str(report))
    assert list(table) == [region.name for region in report.regions]
    assert {name: cells[0] for name, cells in table.items()} == {
        region.name: "✂" if region.removed else "" for region in report.regions
    }
    for region in report.regions:
        share = f"{100 * region.flops / report.before.flops:.1f}%"
        expected = (region.name, region.kind, f"{region.score:.3g}", share, quantity(region.params))
        assert table[region.name][1:] == expected


@pytest.mark.usefixtures("wide")
def test_the_table_opens_with_before_and_after(report: Report) -> None:
    lines = {line.split("  ")[0].strip(): line.split() for line in str(report).splitlines()[:4]}
    assert lines["FLOPs per image"][3:5] == [quantity(report.before.flops), quantity(report.after.flops)]
    assert lines["FLOPs per image"][5] == f"{1 - report.after.flops / report.before.flops:.1%}"
    assert lines["parameters"][1:3] == [quantity(report.before.params), quantity(report.after.params)]
    assert lines["blocks"][1:] == ["4", "2", "2"]


@pytest.mark.usefixtures("wide")
def test_the_table_closes_with_the_settings(report: Report) -> None:
    last = " ".join(str(report).split())[-400:]
    assert "removed 2 of 4 candidates for a budget of 0.3 of flops, by grad_delta on 5 images" in last
    assert "seed 0" in last


@pytest.mark.usefixtures("wide")
def test_the_table_says_what_cannot_go_and_why(report: Report) -> None:
    refused = str(report).split("Not removable")[1]
    assert all(rejection.name in refused for rejection in report.rejections)
    assert "it changes the shape" in refused


@pytest.mark.usefixtures("wide")
def test_the_table_of_two_prunings_marks_both(twice: nn.Module) -> None:
    report = fxprune.report(twice)
    table = rows(str(report))
    assert {name for name, cells in table.items() if cells[0] == "✂"} == set(names(twice))
    assert len(table) == 4
    assert "removed 3 of 4 candidates" in " ".join(str(report).split())


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_text_keeps_to_the_terminal(report: Report, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = str(report)
    assert max(map(len, text.splitlines())) <= int(columns)
    assert "\x1b" not in text
    assert text.count("✂") == 3
    assert str(report) == text


def test_a_console_prints_the_table_with_colour(report: Report) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=120, record=True)
    console.print(report)
    assert "\x1b[" in cast(io.StringIO, console.file).getvalue()
    assert set(rows(console.export_text())) == {region.name for region in report.regions}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12, "12"), (999, "999"), (1_000, "1k"), (12_300_000, "12.3M"), (8.7e9, "8.7G"), (1.5e12, "1.5T")],
)
def test_quantities_have_prefixes(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize("value", [999.6, 999_600, 999_999])
def test_quantities_round_into_the_next_prefix(value: float) -> None:
    assert quantity(value) in ("1k", "1M")


# Refused -------------------------------------------------------------------------------------------------------------


def test_a_model_that_was_not_pruned(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="Tiny carries no fxprune plan: it was not pruned, or rebuilt since"):
        fxprune.report(model)


def test_a_part_of_a_pruned_model_is_not_the_model() -> None:
    pruned = fxprune.compile(build(Detector), LOADER, 0.3)
    with pytest.raises(ModelError, match="carries no fxprune plan"):
        fxprune.report(pruned.get_submodule("body"))


@pytest.mark.parametrize("thing", [None, "plan.json", {}])
def test_something_that_is_no_model(thing: Any) -> None:
    with pytest.raises(ModelError, match=f"expected a torch.nn.Module, got {type(thing).__name__}"):
        fxprune.report(thing)
