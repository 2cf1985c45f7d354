"""A small model of Hugging Face transformers with tied weights and a buffer that no file has. Needs transformers.

In the format of its first release, which `save_pretrained` writes, two of its weights are one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.modeling_outputs import ImageClassifierOutput

import fxprune
from fxprune.planning.analysis import Analysis
from tests.helpers.models import Block, Waves, pixels
from tests.helpers.removals import plan_for


class SmallConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "fxprune_small"

    def __init__(self, width: int = 8, **kwargs: Any) -> None:
        self.width = width
        super().__init__(**{"num_labels": 5, "tie_word_embeddings": True, **kwargs})


class SmallPreTrained(PreTrainedModel):  # type: ignore[misc]
    config_class = SmallConfig
    _tied_weights_keys = {"same.(?![0])\\d+": "same.0"}  # noqa: RUF012

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        width = config.width
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(OrderedDict(first=Block(width), waves=Waves(width), last=Block(width)))
        self.same = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.fc = nn.Linear(width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Waves):
            module.steps.copy_(torch.linspace(0, 1, self.config.width).view(-1, 1, 1))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        x = self.blocks(self.stem(pixel_values))
        for layer in self.same:
            x = layer(x)
        logits = self.fc(x.mean((2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(SmallConfig.model_type, SmallConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallConfig, SmallPreTrained, exist_ok=True)
BOTH = [
    WeightConverter(f"waves.both.{kind}", [f"waves.first.{kind}", f"waves.second.{kind}"], operations=[Chunk(dim=0)])
    for kind in ("weight", "bias")
]
register_checkpoint_conversion_mapping(SmallPreTrained.__name__, BOTH, overwrite=True)

REMOVED = {"blocks.first", "blocks.waves.first", "same.0"}
"""Paths of what `prune_small` removes: a block, a layer within a module that becomes a graph, a tied weight's first."""


def build_small(seed: int = 0) -> SmallPreTrained:
    torch.manual_seed(seed)
    return SmallPreTrained(SmallConfig()).eval()


def batches() -> list[dict[str, Tensor]]:
    return [{"pixel_values": pixels(4, 3, 16, 16, seed=seed), "labels": torch.arange(4)} for seed in range(2)]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return cast(Tensor, model(**batch).loss)


def analyze(model: nn.Module) -> Analysis:
    return fxprune.analyze(model, batches(), loss=loss, criterion="l1")


def prune(model: nn.Module, names: set[str]) -> nn.Module:
    analysis = analyze(model)
    assert names <= {region.name for region in analysis.regions}, [region.name for region in analysis.regions]
    return fxprune.apply(model, plan_for(analysis, names))
