"""The python blocks of every page in docs/ run, one after the other, and do what the page says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.readme import blocks_in

Names = dict[str, Any]


@contextmanager
def huggingface() -> Iterator[Names]:
    transformers: Any = pytest.importorskip("transformers", reason='pip install "fxprune[huggingface]"')
    pytest.importorskip("accelerate", reason='pip install "fxprune[huggingface]"')
    from PIL import Image

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.YolosConfig(**size, image_size=[32, 32], num_detection_tokens=5, num_labels=3)
    labels = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    processor = transformers.YolosImageProcessor(do_resize=False, do_pad=False)
    names: Names = {
        "model": transformers.YolosForObjectDetection(config).eval(),
        "dataset": [{"pixel_values": torch.rand(3, 32, 32), "labels": labels} for _ in range(4)],
        "image": Image.new("RGB", (32, 32)),
        "image_processor": processor,
    }

    def collate(rows: list[Names]) -> Names:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }

    names["collate"] = collate
    yield names
    sizes = {key: names[key].num_parameters() for key in ("model", "pruned", "again", "tuned")}
    assert sizes["pruned"] == sizes["again"] == sizes["tuned"] < sizes["model"]


PAGES: dict[str, Callable[[], AbstractContextManager[Names]]] = {"huggingface.md": huggingface}
"""By page: gives the names that the page takes for granted, and then checks what its blocks made of them."""


def test_every_page_with_python_blocks_is_listed() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if blocks_in(path.read_text(encoding="utf-8"))}
    assert pages == set(PAGES)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "docs" / page
    with PAGES[page]() as names:
        for block in blocks_in(path.read_text(encoding="utf-8")):
            exec(compile(block, str(path), "exec"), names)
