"""The python blocks of every page in docs/ run, one after the other, and do what the page says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from tests.helpers.paths import ROOT
from tests.helpers.readme import blocks_in
from tests.helpers.yolo_data import count, write_data

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


@contextmanager
def a_trained_yolo() -> Iterator[Names]:
    """A folder with `best.pt`, its data set `data.yaml` and `image.jpg`."""
    ultralytics: Any = pytest.importorskip("ultralytics")
    data = Path(write_data(Path("data"), ["cat", "dog"]))
    Path("data.yaml").write_text(data.read_text())
    Path("image.jpg").write_bytes((data.parent / "images" / "val" / "0.jpg").read_bytes())
    yolo = ultralytics.YOLO("yolov8n.yaml")
    yolo.model = type(yolo.model)("yolov8n.yaml", nc=2, verbose=False)
    yolo.model.names = {0: "cat", 1: "dog"}
    yolo.ckpt = {"train_args": {"imgsz": 64}}
    yolo.save("best.pt")
    yield {}


@contextmanager
def train_yolo() -> Iterator[Names]:
    with a_trained_yolo() as names:
        yield names
    sizes = [count(names[key].model) for key in ("pruned", "distilled", "again", "labelled", "model")]
    assert len(set(sizes[:4])) == 1
    assert sizes[0] < sizes[4]


@contextmanager
def ship() -> Iterator[Names]:
    with a_trained_yolo() as names:
        yield names
    assert count(names["loaded"].model) == count(names["pruned"].model) < count(names["model"].model)
    assert len(names["found"]) == 1
    assert Path(names["path"]).name == "best_pruned.torchscript"
    assert names["needs_fxprune"] is any(isinstance(part, fx.GraphModule) for part in names["pruned"].model.modules())


PAGES: dict[str, Callable[[], AbstractContextManager[Names]]] = {
    "huggingface.md": huggingface,
    "ship.md": ship,
    "train_yolo.md": train_yolo,
}
"""By page: gives the names that the page takes for granted, and then checks what its blocks made of them."""


def test_every_page_with_python_blocks_is_listed() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if blocks_in(path.read_text(encoding="utf-8"))}
    assert pages == {*PAGES, "quantise.md"}  # which has a test of its own


SLOW = {"train_yolo.md"}
SHORT = {
    "steps=400": "steps=2",
    "epochs=50": "epochs=1, workers=0, plots=False, verbose=False",
    "imgsz=640": "imgsz=64",
}
"""Settings of the pages, and what a test can afford."""


@pytest.mark.filterwarnings("ignore:.*:fxprune.FxpruneWarning")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in sorted(PAGES)]
)
def test_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "docs" / page
    blocks = blocks_in(path.read_text(encoding="utf-8"))
    assert blocks
    with PAGES[page]() as names:  # checks at its end what the blocks made
        for block in blocks:
            for written, short in SHORT.items():
                block = block.replace(written, short)
            exec(compile(block, str(path), "exec"), names)
