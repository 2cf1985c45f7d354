"""Tests of `draw_trained`: drawings of trained detectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tests.tiny_subject import make_subject
from benchmarks.training import draw_trained


def test_main_draws_detectors_with_their_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_trained, "load_subjects", lambda options: [make_subject()])
    draw_trained.main(["--budget", "0.2", "--out", str(tmp_path / "pictures")])
    page, still = ((tmp_path / "pictures" / f"tiny.{suffix}").read_text() for suffix in ("html", "svg"))
    assert '"initial":19' in page.replace(" ", "")
    assert "removed" in still
