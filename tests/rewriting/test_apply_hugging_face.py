"""Removals that get in each other's way: one takes a part that the graph made for another reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxprune

transformers: Any = pytest.importorskip("transformers")


def test_a_removal_inside_a_part_that_another_makes_a_graph_is_carried_out() -> None:
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[2] * 4, layer_type="basic", out_features=["stage4"]
    )
    sizes = {
        f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 64))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 10, "num_labels": 10}
    config = transformers.DabDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        hidden_size=32, **sizes, **heads,
    )  # fmt: skip
    model = transformers.DabDetrForObjectDetection(config).eval()
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.2]])
    batch = {
        "pixel_values": torch.rand(2, 3, 64, 64),
        "labels": [{"class_labels": torch.tensor([1, 2]), "boxes": boxes}] * 2,
    }
    pruned: Any = fxprune.compile(model, [batch], 0.15, loss=lambda module, given: module(**given).loss, heal="none")
    assert len(fxprune.report(pruned).removed) > 1
    with torch.no_grad():
        assert bool(torch.isfinite(pruned(**batch).logits).all())
