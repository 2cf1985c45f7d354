"""Functions and values of a package in pickles say what to install, or are left out, where the package is missing."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxprune.runtime.pickled_names import NEEDED

SOURCE = """
from fxprune.runtime.pickled_names import OptionalName, PickledName

@PickledName
def restored(value):
    return [value]

class Kept:
    def __reduce__(self):
        return restored, (3,)

OPTIONAL = OptionalName(__name__, "OPTIONAL")
"""
NAME = "package_of_the_pickles"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module that can be imported until the test takes its folder off the path."""
    (tmp_path / f"{NAME}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME)
    monkeypatch.setattr(sys, "path", sys.path[1:])
    importlib.invalidate_caches()


def test_function_is_found_by_its_name(package: Any) -> None:
    assert package.restored(2) == [2]
    assert pickle.loads(pickle.dumps(package.Kept())) == [3]


def test_missing_package_is_named_with_what_to_install(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written = pickle.dumps(package.Kept())
    uninstall(monkeypatch)
    with pytest.raises(AttributeError, match=NEEDED):
        pickle.loads(written)


def test_optional_value_is_itself_or_none(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written = pickle.dumps([package.OPTIONAL])
    assert pickle.loads(written) == [package.OPTIONAL]
    assert copy.deepcopy([package.OPTIONAL])[0] is package.OPTIONAL
    uninstall(monkeypatch)
    assert pickle.loads(written) == [None]
