"""How a plan was made: a mapping that cannot be changed, with typed views."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fxprune.planning.provenance import Provenance

ENTRIES: dict[str, Any] = {
    "criterion": "fisher",
    "strategy": "search",
    "tried": 7,
    "loss_increase": 0.25,
    "latency": {"backend": "eager", "floor": 0.02},
    "versions": {"torch": "2.14.1"},
    "heal": {"method": "affine"},
}


def test_provenance_reads_as_the_mapping_it_was_made_of() -> None:
    made = Provenance(ENTRIES)
    assert dict(made) == ENTRIES
    assert made == ENTRIES
    assert json.loads(json.dumps(dict(made))) == ENTRIES
    assert (made.criterion, made.strategy, made.tried, made.loss_increase) == ("fisher", "search", 7, 0.25)
    assert (made.latency_floor, made.healing["method"], made.versions) == (0.02, "affine", {"torch": "2.14.1"})
    assert made.agreement is None


def test_provenance_is_not_changed_through_what_it_was_made_of() -> None:
    entries = dict(ENTRIES)
    made = Provenance(entries)
    entries["criterion"] = "harm"
    assert made.criterion == "fisher"
    with pytest.raises(TypeError):
        made["criterion"] = "harm"  # type: ignore[index]


def test_with_entries_and_without_return_copies() -> None:
    made = Provenance(ENTRIES)
    assert made.with_entries(tried=8).tried == 8
    assert made.with_entries(loss_increase=math.inf)["loss_increase"] is None
    assert "heal" not in made.without("heal")
    assert dict(made) == ENTRIES


@pytest.mark.parametrize("strange", [None, "much", [1], {"before": "x"}, True])
def test_entries_of_another_kind_are_read_as_nothing(strange: Any) -> None:
    made = Provenance(dict.fromkeys(ENTRIES, strange))
    assert made.tried is None
    assert made.loss_increase is None
    assert made.latency_floor == 0.0
    assert isinstance(made.criterion, str)
    assert all(isinstance(version, str) for version in made.versions.values())
