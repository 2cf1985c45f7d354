"""Plan files that do not fit the schema are refused with the name of the field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fxprune import Plan, PlanError
from tests.helpers.hostile import changed


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("budget", r"'plan' lacks \['budget'\]"),
        ("settings", r"'plan' lacks \['settings'\]"),
        ("before", "'before' should be an object"),
        ("islands", "'islands' should be a list"),
        ("after.flops", r"'after' lacks \['flops'\]"),
        ("regions[1].exit", r"'regions\[1\]' lacks \['exit'\]"),
        ("regions[0].removed", r"'regions\[0\]' lacks \['removed'\]"),
        ("regions[0].latency_ms", r"'regions\[0\]' lacks \['latency_ms'\]"),
        ("islands[0].fingerprint", r"'islands\[0\]' lacks \['fingerprint'\]"),
        ("rejections[1].reason", r"'rejections\[1\]' lacks \['reason'\]"),
    ],
)
def test_missing_field_is_refused_by_name(plan: Plan, path: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"plan field {message}"):
        Plan.from_dict(changed(plan.to_dict(), path, ...))


@pytest.mark.parametrize(
    ("path", "where"), [("note", "plan"), ("before.watts", "before"), ("regions[1].mask", r"regions\[1\]")]
)
def test_unknown_field_is_refused_by_name(plan: Plan, path: str, where: str) -> None:
    with pytest.raises(PlanError, match=rf"'{where}' has unknown \['{path.split('.')[-1]}'\]"):
        Plan.from_dict(changed(plan.to_dict(), path, 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("budget", "a tenth"),
        ("budget", True),
        ("cost", 3),
        ("settings", ["grad_delta"]),
        ("settings", None),
        ("before", [1, 2, 3]),
        ("before.params", 1.5),
        ("before.params", True),
        ("before.flops", None),
        ("before.latency_ms", "fast"),
        ("islands", {"name": ""}),
        ("islands[0]", "body"),
        ("islands[0].opaque", "neck"),
        ("regions", "all"),
        ("regions[0]", None),
        ("regions[0].score", "low"),
        ("regions[0].removed", "yes"),
        ("regions[0].removed", 1),
        ("regions[0].nodes", "conv1"),
        ("regions[0].nodes", [1, 2]),
        ("regions[0].layers", [["conv1"]]),
        ("regions[0].exit", None),
        ("rejections[0].reason", 7),
    ],
)
def test_field_of_wrong_type_is_refused_by_name(plan: Plan, path: str, value: Any) -> None:
    with pytest.raises(PlanError, match=rf"plan field '(plan\.)?{re.escape(path)}(\[0\])?' should be"):
        Plan.from_dict(changed(plan.to_dict(), path, value))


@pytest.mark.parametrize("version", [0, 5, "1", None, 1.5])
def test_other_schema_version_is_refused(plan: Plan, version: Any) -> None:
    with pytest.raises(PlanError, match=rf"version {version!r}, .*reads 1 to 4"):
        Plan.from_dict({**plan.to_dict(), "fxprune_plan": version})


def test_schema_version_1_is_read_without_latency(plan: Plan) -> None:
    data = plan.to_dict() | {"fxprune_plan": 1}
    for row in (data["before"], data["after"], *data["regions"]):
        del row["latency_ms"]
    assert Plan.from_dict(data) == plan
    with pytest.raises(PlanError, match=r"'before' lacks \['latency_ms'\]"):
        Plan.from_dict(data | {"fxprune_plan": 2})


def test_schema_version_2_is_read_without_constants(plan: Plan) -> None:
    data = plan.to_dict()
    for row in data["islands"]:
        assert row.pop("constants") == {}
    assert Plan.from_dict(data | {"fxprune_plan": 2}) == plan
    with pytest.raises(PlanError, match=r"'islands\[0\]' lacks \['constants'\]"):
        Plan.from_dict(data)


def test_schema_version_3_is_read_without_contiguous_stand_ins(plan: Plan) -> None:
    data = plan.to_dict()
    for row in data["regions"]:
        assert row.pop("contiguous") is False
    assert Plan.from_dict(data | {"fxprune_plan": 3}) == plan
    with pytest.raises(PlanError, match=r"'regions\[0\]' lacks \['contiguous'\]"):
        Plan.from_dict(data)


@pytest.mark.parametrize("constants", [None, ["mask"], {"mask": {}}, {"sizes": [1, [{}]]}])
def test_constants_of_wrong_type_are_refused(plan: Plan, constants: Any) -> None:
    with pytest.raises(PlanError, match=r"'islands\[0\].constants' should be an object of constants"):
        Plan.from_dict(changed(plan.to_dict(), "islands[0].constants", constants))


@pytest.mark.parametrize("data", [{}, {"budget": 0.1}, [], None, "plan.json"])
def test_data_that_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(PlanError, match=r"no fxprune plan.*'fxprune_plan'"):
        Plan.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"plan: yes"])
def test_file_that_is_not_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"broken\.json: not a JSON file"):
        Plan.load(tmp_path / "broken.json")


def test_broken_plan_file_is_refused_by_name_and_field(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(json.dumps(changed(plan.to_dict(), "regions[1].exit", ...)))
    with pytest.raises(PlanError, match=r"broken\.json.*'regions\[1\]' lacks \['exit'\]"):
        Plan.load(tmp_path / "broken.json")


def test_missing_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")
