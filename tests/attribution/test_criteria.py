"""The recorder compared with hooks on the eager model, and the criteria compared with their formulas."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

import fxprune
from fxprune.attribution.criteria import FISHER_GATE, part_sizes, relative_loss
from fxprune.errors import LossError
from tests.helpers.models import tiny
from tests.helpers.zoo import ZOO, image_batch, mean_loss


def labelled(images: int = 4, size: int = 48) -> tuple[Tensor, Tensor]:
    """A classifier's batch."""
    return torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(3)), torch.arange(images) % 10


def small_resnet() -> nn.Module:
    torch.manual_seed(5)
    return resnet18(num_classes=10).eval()


class Observed:
    """Output and gradient of every call of every leaf module, by hooks on the eager model."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> object:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            output.retain_grad()
            self.outputs.setdefault(name, []).append(output)
            return output.clone()  # what follows may overwrite it

        return hook


def without_inplace(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return model


def test_recorder_matches_hooks_at_every_node() -> None:
    model, (images, labels) = small_resnet(), labelled()
    analysis = fxprune.analyze(model, [(images, labels)], criterion="grad_act")
    eager = without_inplace(copy.deepcopy(model))
    observed = Observed(eager)
    functional.cross_entropy(eager(images.requires_grad_()), labels).backward()  # type: ignore[no-untyped-call]
    recorded: dict[str, list[float]] = {}
    for node in analysis.nodes:
        if node.grad_act is not None:
            recorded.setdefault(node.name, []).append(node.grad_act)
    checked = 0
    for name, outputs in observed.outputs.items():
        expected = [float((output * output.grad).abs().sum().detach()) for output in outputs if output.grad is not None]
        assert sorted(recorded[name]) == pytest.approx(sorted(expected), rel=1e-4)
        checked += len(expected)
    assert checked > 50


def test_grad_act_of_a_region_is_grad_act_of_its_exit() -> None:
    analysis = fxprune.analyze(small_resnet(), [labelled()], criterion="grad_act")
    nodes = {node.node: node.grad_act for node in analysis.nodes}
    assert all(region.score == nodes[region.exit] for region in analysis.regions)


def test_grad_delta_compares_exit_with_stand_in() -> None:
    model, (images, labels) = small_resnet(), labelled()
    analysis = fxprune.analyze(model, [(images, labels)], criterion="grad_delta")
    scores = {region.name: region.score for region in analysis.regions}
    eager = without_inplace(copy.deepcopy(model))
    values: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            values[f"{name}.in"], values[name] = args[0], output

        return hook

    for name in ("layer1.0", "layer2.1", "layer2.0.downsample", "layer4.1"):
        eager.get_submodule(name).register_forward_hook(keep(name))  # type: ignore[arg-type]
    functional.cross_entropy(eager(images.requires_grad_()), labels).backward()  # type: ignore[no-untyped-call]
    for name in ("layer1.0", "layer2.1", "layer4.1"):
        gradient = values[name].grad
        assert gradient is not None
        expected = float((gradient * (values[name] - values[f"{name}.in"])).abs().sum().detach())
        assert scores[name] == pytest.approx(expected, rel=1e-4)
    dropped = values["layer2.0.downsample"]
    assert dropped.grad is not None
    expected = float((dropped.grad * dropped).abs().sum().detach())
    assert scores["layer2.0.downsample"] == pytest.approx(expected, rel=1e-4)


def test_scores_do_not_depend_on_batch_size() -> None:
    model, (images, labels) = small_resnet(), labelled(6)
    one = fxprune.analyze(model, [(images, labels)])
    many = fxprune.analyze(model, [(images[:1], labels[:1]), (images[1:3], labels[1:3]), (images[3:], labels[3:])])
    assert one.settings["images"] == many.settings["images"] == 6
    for a, b in zip(one.regions, many.regions, strict=True):
        assert a.name == b.name
        assert a.score == pytest.approx(b.score, rel=1e-3)


def test_l1_sums_absolute_weights_of_two_or_more_dimensions() -> None:
    model = small_resnet()
    analysis = fxprune.analyze(model, [labelled()], criterion="l1")
    block = model.get_submodule("layer3.1")
    expected = sum(float(w.detach().abs().sum()) for w in block.parameters() if w.ndim >= 2)
    assert {r.name: r.score for r in analysis.regions}["layer3.1"] == pytest.approx(expected, rel=1e-6)


def test_random_depends_on_the_seed_alone() -> None:
    def scores(seed: int) -> list[float]:
        regions = fxprune.analyze(small_resnet(), [labelled()], criterion="random", seed=seed).regions
        return [region.score for region in regions]

    assert scores(1) == scores(1) != scores(2)


def test_custom_criterion_gets_region_and_modules() -> None:
    def parameters(region: object, modules: object) -> float:
        return float(sum(p.numel() for m in modules.values() for p in m.parameters()))  # type: ignore[attr-defined]

    analysis = fxprune.analyze(small_resnet(), [labelled()], criterion=parameters)
    block = {region.name: region for region in analysis.regions}["layer4.1"]
    weights = small_resnet().get_submodule("layer4.1").named_parameters()
    assert block.score == sum(weight.numel() for name, weight in weights if "conv" in name)
    assert analysis.settings["criterion"] == "parameters"


def test_scores_of_frozen_weights_equal_those_of_trainable_weights() -> None:
    free = small_resnet()
    frozen = copy.deepcopy(free).requires_grad_(False)
    scores = [[region.score for region in fxprune.analyze(m, [labelled()]).regions] for m in (free, frozen)]
    assert scores[0] == scores[1]
    assert min(scores[0]) > 0


def test_scores_of_a_shared_layer_add_up_over_calls() -> None:
    analysis = fxprune.analyze(ZOO["shared_head"].build(), [image_batch()], loss=mean_loss)
    first, second = analysis.regions
    assert first.params == second.params == 0
    both = analysis.plan(0.3, cost="params")
    assert len(both.removed) == 2
    assert both.before.params - both.after.params == 4 * 4 * 9 + 4


def test_loss_without_gradient_is_refused() -> None:
    with pytest.raises(LossError, match="does not depend"):
        fxprune.analyze(small_resnet(), [labelled()], loss=lambda model, batch: torch.zeros((), requires_grad=True))


def test_fisher_is_the_mean_squared_derivative_by_channel_gates() -> None:
    model, (images, labels) = tiny(), labelled(5, 16)
    analysis = fxprune.analyze(model, [(images[:2], labels[:2] % 5), (images[2:], labels[2:] % 5)], criterion="fisher")
    gates = torch.full((4, 5, 8, 1, 1), FISHER_GATE, requires_grad=True)
    x = model.get_submodule("stem")(images)
    for block, gate in zip(model.get_submodule("blocks").children(), gates, strict=True):
        x = x + gate * (block(x) - x)
    logits = model.get_submodule("fc")(x.mean((2, 3)))
    functional.cross_entropy(logits, labels % 5, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert gates.grad is not None
    squares = gates.grad.square().sum((2, 3, 4)).mean(1)
    expected = {f"blocks.{index}": float(square) ** 2 for index, square in enumerate(squares)}
    assert {region.name: region.score for region in analysis.regions} == pytest.approx(expected, rel=1e-4)


def test_relative_loss_weighs_every_part_equally() -> None:
    parts = torch.tensor([200.0, 0.5], requires_grad=True)
    relative_loss(parts).backward()  # type: ignore[no-untyped-call]
    assert parts.grad is not None
    assert parts.grad.tolist() == pytest.approx([1 / 200, 1 / 0.5])
    alone = torch.tensor([3.0], requires_grad=True)
    assert relative_loss(alone).item() == 3.0


@pytest.mark.parametrize(("parts", "sizes"), [([9.0, 0.0], [9.0, 0.009]), ([-9.0, 1.0], [9.0, 1.0])])
def test_relative_loss_of_a_zero_part_uses_a_thousandth(parts: list[float], sizes: list[float]) -> None:
    assert part_sizes(torch.tensor(parts)).tolist() == pytest.approx(sizes, rel=2e-3)
    assert bool(torch.isfinite(relative_loss(torch.zeros(2))))


def test_recorder_frees_a_batch_after_use() -> None:
    def tensors_alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model = small_resnet()
    fxprune.analyze(model, [labelled()])
    before = tensors_alive()
    fxprune.analyze(model, [labelled()])
    assert tensors_alive() == before
