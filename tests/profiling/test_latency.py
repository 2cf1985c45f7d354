"""Latency of regions, on a fake clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune import SettingError
from fxprune.adapters import classifier
from fxprune.graph.interpreters import Graphs
from fxprune.profiling.latency import (
    BACKENDS,
    Backend,
    Latency,
    ProbeInputs,
    backend_copy,
    compiled_probe,
    frozen_eval_mode,
    measure_latency,
    node_probe,
    significant_median,
)
from tests.helpers.captures import capture_copy
from tests.helpers.clocks import FakeClock
from tests.helpers.models import Block, Detector, build, labelled, pixels, tiny

X = pixels(2, 3, 16, 16)
CONVS = {"body.1.conv": 4.0, "body.2.conv": 3.0, "body.3.conv": 2.0, "body.4.conv": 1.0, "head.0.conv": 0.5}
STEM, OUTSIDE = 2.0, 5.0
WHOLE = sum(CONVS.values()) + STEM + OUTSIDE
REGIONS = {name.removesuffix(".conv"): milliseconds for name, milliseconds in CONVS.items()}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def model(clock: FakeClock) -> nn.Module:
    """Every convolution takes its time, and so does what is outside of the graphs."""
    made = distinct(build(Detector), CONVS)
    for name, milliseconds in {**CONVS, "body.0": STEM, "": OUTSIDE}.items():
        clock.slow_down(made.get_submodule(name), milliseconds)
    return made


def distinct(model: nn.Module, convolutions: Iterable[str]) -> nn.Module:
    """Give each of some convolutions a kernel of another size, so that no two regions do equal work."""
    for index, name in enumerate(convolutions):
        block: Any = model.get_submodule(name.removesuffix(".conv"))
        block.conv = nn.Conv2d(8, 8, 2 * index + 1, padding=index, bias=False)
    return model


def measured(model: nn.Module, clock: FakeClock, backend: Backend = BACKENDS["eager"], **options: Any) -> Latency:
    """Latency of a model and of all its regions."""
    adapter = classifier.ADAPTER
    batch = adapter.normalize(model, X)
    now = clock.now
    regions = [row.region for row in fxprune.analyze(model, labelled(), criterion="l1").regions]
    twin = backend_copy(model, backend)
    whole, islands = capture_copy(model, X, adapter.whole_model_is_graph)
    graphs = Graphs.of(whole, islands)
    clock.now = now
    return measure_latency(
        backend, twin, whole, graphs, regions, adapter, batch, **{"rounds": 6, "clock": clock, **options}
    )


def on(probe: Callable[..., Any], ready: Callable[[nn.Module], None] = lambda module: None) -> Backend:
    return Backend(ready, probe)


# What is measured ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [node_probe, compiled_probe])
def test_latency_of_a_region_is_that_of_its_layers(
    model: nn.Module, clock: FakeClock, probe: Callable[..., Any]
) -> None:
    latency = measured(model, clock, on(probe))
    assert latency.whole_ms == pytest.approx(WHOLE)
    assert latency.regions_ms == pytest.approx(REGIONS)
    assert latency.settings == {
        "device": "cpu", "images": 2, "threads": torch.get_num_threads(), "rounds": 6, "floor": pytest.approx(0.0),
    }  # fmt: skip


def test_interpreter_overhead_is_not_counted(
    model: nn.Module, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = fx.Interpreter.fetch_args_kwargs_from_env

    def slowly(self: fx.Interpreter, node: fx.Node) -> Any:
        clock.now += 0.001
        return fetch(self, node)

    monkeypatch.setattr(fx.Interpreter, "fetch_args_kwargs_from_env", slowly)
    assert measured(model, clock).regions_ms == pytest.approx(REGIONS)


def test_backend_twice_as_fast_halves_the_latency_of_regions(model: nn.Module, clock: FakeClock) -> None:
    def halve(module: nn.Module) -> None:
        for name in [*CONVS, "body.0"]:
            layer: Any = module.get_submodule(name)
            layer.milliseconds = [one / 2 for one in layer.milliseconds]

    latency = measured(model, clock, on(node_probe, halve))
    assert latency.whole_ms == pytest.approx((WHOLE - OUTSIDE) / 2 + OUTSIDE)
    assert latency.regions_ms == pytest.approx({name: one / 2 for name, one in REGIONS.items()})


def test_call_overhead_of_a_region_module_is_not_counted(model: nn.Module, clock: FakeClock) -> None:
    def pay_for_a_call(module: nn.Module) -> None:
        if isinstance(module, fx.GraphModule):
            clock.slow_down(module, 7.0)

    assert measured(model, clock, on(compiled_probe, pay_for_a_call)).regions_ms == pytest.approx(REGIONS)


def test_latency_of_a_region_is_the_mean_cost_of_one_more_copy(model: nn.Module, clock: FakeClock) -> None:
    def grow_unevenly(module: nn.Module) -> None:
        for name, part in module.named_modules():
            if name.endswith("norm") and (more := {"1": 6.0, "2": 1.0}.get(name[0])):
                clock.slow_down(part, more)

    found = measured(model, clock, on(compiled_probe, grow_unevenly)).regions_ms
    assert found == pytest.approx({name: own + 3.5 for name, own in REGIONS.items()})


def test_equal_regions_are_compiled_once(clock: FakeClock) -> None:
    ready: list[nn.Module] = []
    mixed = nn.Sequential(nn.Conv2d(3, 8, 1), *(Block(8) for _ in range(3)), nn.Conv2d(8, 4, 1), Block(4))
    model = nn.Sequential(mixed, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    for index, milliseconds in ((1, 3.0), (2, 3.0), (3, 3.0), (5, 1.0)):
        clock.slow_down(model.get_submodule(f"0.{index}.conv"), milliseconds)
    latency = measured(model, clock, on(compiled_probe, lambda module: ready.append(module)))
    assert len(ready) == 1 + 2 * 2
    assert latency.regions_ms == pytest.approx({"0.1": 3.0, "0.2": 3.0, "0.3": 3.0, "0.5": 1.0})


class Halves(nn.Module):
    """Calls one captured part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        halves = [half for half in x.chunk(2, -1) if bool(torch.isfinite(half).all())]
        return self.fc(torch.stack([self.body(half).mean((2, 3)) for half in halves]).sum(0))


@pytest.mark.parametrize("probe", [node_probe, compiled_probe])
def test_latency_of_repeated_calls_adds_up(clock: FakeClock, probe: Callable[..., Any]) -> None:
    model = distinct(build(Halves), ["body.1.conv", "body.2.conv"])
    clock.slow_down(model.get_submodule("body.1.conv"), 2.0)
    clock.slow_down(model.get_submodule("body.2.conv"), 1.0)
    assert measured(model, clock, on(probe)).regions_ms == pytest.approx({"body.1": 4.0, "body.2": 2.0})


def test_nested_graphs_are_counted_once(clock: FakeClock) -> None:
    class Inner(nn.Module):
        """Cannot be traced; what it calls can."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(8), Block(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x) if bool(torch.isfinite(x).all()) else x

    model = build(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Block(8), Inner(), Pool(), nn.Linear(8, 5)))
    for name, milliseconds in (("1.conv", 1.0), ("2.blocks.0.conv", 2.0), ("2.blocks.1.conv", 4.0), ("0", 3.0)):
        clock.slow_down(model.get_submodule(name), milliseconds)
    latency = measured(model, clock)
    assert latency.whole_ms == pytest.approx(10.0)
    inside = {"1": 1.0, "2.blocks.0": 2.0, "2.blocks.1": 4.0}
    assert {name: latency.regions_ms[name] for name in inside} == pytest.approx(inside)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 2.0, 2.0], 2.0),
        ([1.9, 2.0, 2.1], 2.0),
        ([-5.0, 1.0, 9.0, -7.0, 2.0], 0.0),
        ([-1.0] * 5, 0.0),
        ([0.0], 0.0),
    ],
)
def test_latency_within_the_noise_is_zero(values: list[float], expected: float) -> None:
    assert significant_median(values) == expected


@pytest.mark.parametrize("probe", [node_probe, compiled_probe])
def test_region_within_the_noise_saves_nothing(model: nn.Module, clock: FakeClock, probe: Callable[..., Any]) -> None:
    clock.slow_down(model.get_submodule("body.3.norm"), 0.0, 0.0, 30.0)
    latency = measured(model, clock, on(probe))
    assert latency.regions_ms["body.3"] == 0.0
    assert latency.regions_ms["body.1"] > 0


def test_latency_does_not_count_warmup(model: nn.Module, clock: FakeClock) -> None:
    clock.slow_down(model.get_submodule("body.1.norm"), *[300.0] * 2, *[0.0] * 100)  # two calls warm up
    assert measured(model, clock, rounds=2).regions_ms == pytest.approx(REGIONS)


def test_floor_is_the_spread_of_the_model_against_itself(model: nn.Module, clock: FakeClock) -> None:
    steady = measured(model, clock).settings["floor"]
    clock.slow_down(model.get_submodule(""), 0.0, 2.0, 1.0, 0.0, 4.0)
    assert steady < 1e-9 < 0.02 < measured(model, clock, rounds=8).settings["floor"] < 1


@pytest.mark.parametrize("probe", [node_probe, compiled_probe])
def test_timed_graphs_match_the_in_place_flags_of_the_model(
    model: nn.Module, clock: FakeClock, probe: Callable[..., Any]
) -> None:
    seen: list[set[bool]] = []

    def watching(watched: ProbeInputs) -> Any:
        acts = [part.inplace for _, gm in watched.graphs for part in gm.modules() if isinstance(part, nn.ReLU)]
        seen.append(set(acts))
        return probe(watched)

    for inplace in (True, False):
        for part in model.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = inplace
        assert measured(model, clock, on(watching)).regions_ms == pytest.approx(REGIONS)
    assert seen == [{True}, {False}]


# What is left as it was ----------------------------------------------------------------------------------------------


def test_backend_copy_shares_weights_only() -> None:
    model = build(Detector)
    twin = backend_copy(model, Backend(lambda module: setattr(module, "mark", 1), node_probe))
    pairs = zip(model.state_dict(keep_vars=True).values(), twin.state_dict(keep_vars=True).values(), strict=True)
    assert all(one is other for one, other in pairs)
    assert not {id(part) for part in model.modules()} & {id(part) for part in twin.modules()}
    assert hasattr(twin, "mark")
    assert not hasattr(model, "mark")


def test_frozen_eval_mode_keeps_eval_and_is_undone_afterwards() -> None:
    model = tiny().train()
    with frozen_eval_mode(model):
        assert model.eval() is model
        assert not any(part.training for part in model.modules())
    assert "eval" not in vars(model)
    assert not model.train().eval().training


@pytest.mark.parametrize("probe", [node_probe, compiled_probe])
def test_failing_backend_error_names_a_way_out(model: nn.Module, clock: FakeClock, probe: Callable[..., Any]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nfound here")

    def refuse(module: nn.Module) -> None:
        if isinstance(module, fx.GraphModule) or probe is node_probe:
            module.register_forward_pre_hook(fail)

    with pytest.raises(SettingError, match=r"RuntimeError: no C\+\+ compiler\); latency_backend='eager'"):
        measured(model, clock, on(probe, refuse))


def test_measure_latency_reports_progress_by_round(model: nn.Module, clock: FakeClock) -> None:
    told: list[tuple[str, int, int | None]] = []
    measured(model, clock, on(compiled_probe), tell=lambda *stage: told.append(stage), rounds=3)
    assert [step for step in told if step[0] == "compile"] == [("compile", done, 5) for done in range(6)]
    assert [done for stage, done, total in told if stage == "latency" and total == 3] == [0, 0, 0, 1, 2, 3]


def test_measure_latency_times_the_backend_copy_as_a_whole(model: nn.Module, clock: FakeClock) -> None:
    called: list[str] = []

    def mark(module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: called.append("twin"))

    measured(model, clock, on(node_probe, mark), rounds=4)
    assert called == ["twin"] * (1 + 2 * (4 + 2))
    assert model(X) is not None
