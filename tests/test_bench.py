"""The benchmark: its shapes, its judgement of who is right, and how it times."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import preload
import pytest
import torch

import fastsgd
from fastsgd import bench
from fastsgd.bench import check, measure, opponents, report, steps
from fastsgd.bench.contest import Settings
from fastsgd.bench.contestants import Inputs, Training, parameters_of
from fastsgd.bench.measure import Effort, Runner, Spread, race
from fastsgd.bench.memory import memory
from fastsgd.bench.rules import RULES, Mode, Rule
from fastsgd.bench.shapes import DTYPES, SHAPES, Shape

SMALL = Shape("small", ((64, 30), (33,), (1,)))
SMALL_HALF = SMALL.in_dtype(torch.bfloat16)
SMALL_MIXED = replace(SMALL, dtype=(torch.float32, torch.float16, torch.float64), groups=(1, 2))
HASTE = Settings(1, Effort(seconds=0.0, pairs=2))


SGD = RULES["sgd"]

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
each_dtype = pytest.mark.parametrize(
    "shape",
    [*(SMALL.in_dtype(dtype) for dtype in DTYPES.values()), SMALL_MIXED],
    ids=[*DTYPES, "mixed"],
)


def lazy(rule: Rule) -> Mode:
    """Stock's class, but one element of the first parameter is left as it was."""

    class Lazy(rule.stock):
        def step(self, closure=None):
            first = self.param_groups[0]["params"][0].detach().view(-1)
            kept = first[0].clone()
            super().step(closure)
            first[0] = kept

    return Mode("lazy", Lazy)


# --- Shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("lesson", 2, 15),
        ("1000x16", 1000, 16_000),
        ("2000x64", 2000, 128_000),
        ("465-groups", 465, 465 * 4096),
        ("mobilenet-v3", 174, 5_483_032),
        ("resnet-50", 161, 25_557_032),
        ("vit-b-16", 152, 86_567_656),
        ("gpt-2", 148, 124_439_808),
        ("gpt-2-bf16", 148, 124_439_808),
    ],
)
def test_counts_are_those_of_the_models(name: str, tensors: int, elements: int) -> None:
    assert (SHAPES[name].tensors, SHAPES[name].elements) == (tensors, elements)


@pytest.mark.parametrize(
    ("name", "moved", "touched"),
    [
        ("sgd", 3, 2),
        ("momentum", 5, 3),
        ("nesterov", 5, 3),
        ("adamw", 7, 4),
        ("adam", 7, 4),
        ("adamw-amsgrad", 9, 5),
        ("rmsprop", 9, 5),
        ("adagrad", 5, 3),
    ],
)
def test_bytes_of_a_step(name: str, moved: int, touched: int) -> None:
    rule = RULES[name]
    assert rule.bytes_moved(SHAPES["resnet-50"]) == moved * 4 * 25_557_032
    assert rule.bytes_touched(SHAPES["resnet-50"]) == touched * 4 * 25_557_032
    assert rule.bytes_moved(SHAPES["gpt-2-bf16"]) == moved * 2 * 124_439_808


@each_rule
def test_the_states_are_as_many_as_the_rule_says(rule: Rule) -> None:
    optimizer = Inputs.random(SMALL).optimizer(rule.ours, rule)
    optimizer.step()
    for p in parameters_of(optimizer):
        states = [x for name, x in optimizer.state[p].items() if name != "step" and x is not None]
        assert [x.shape for x in states] == [p.shape] * rule.states


@each_rule
def test_the_rivals_are_stock_with_each_flag_that_it_has(rule: Rule) -> None:
    names = ["default", "foreach", "fused"] if rule.name != "rmsprop" else ["default", "foreach"]
    assert [mode.name for mode in rule.rivals] == names
    assert isinstance(rule.ours.optimizer([torch.zeros(1)]), rule.stock)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [(SHAPES["465-groups"], [1] * 465), (SMALL_MIXED, [1, 2]), (SMALL, [3])],
    ids=lambda value: getattr(value, "name", ""),
)
def test_groups(shape: Shape, groups: list[int]) -> None:
    optimizer = Inputs.random(shape).optimizer(SGD.ours, SGD)
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    found = [(tuple(p.shape), p.dtype, p.grad.dtype) for p in parameters_of(optimizer)]
    assert found == list(zip(shape.sizes, shape.dtypes, shape.dtypes, strict=True))


def test_a_shape_in_another_dtype() -> None:
    assert SMALL_HALF.name == "small-bf16" and SMALL_HALF.nbytes == 2 * SMALL.elements
    assert SMALL_HALF.in_dtype(torch.float64).name == "small-f64"
    assert SHAPES["gpt-2-bf16"].in_dtype(torch.float32) == SHAPES["gpt-2"]
    assert SMALL_MIXED.in_dtype(torch.float16).dtypes == (torch.float16,) * 3
    assert SMALL_MIXED.nbytes == 4 * 1920 + 2 * 33 + 8


def test_inputs_are_the_same_each_time_and_never_zero() -> None:
    one, two = Inputs.random(SMALL_HALF), Inputs.random(SMALL_HALF)
    for a, b in zip(one.gradients, two.gradients, strict=True):
        assert torch.equal(a, b) and a.abs().min() >= 0.25


# --- Who is right -----------------------------------------------------------------------------


@each_dtype
@each_rule
def test_a_right_result_is_found_right(shape: Shape, rule: Rule) -> None:
    inputs = Inputs.random(shape)
    truth = check.reference(inputs, rule)
    for mode in (rule.ours, *(m for m in rule.rivals if m.name != "fused")):
        _, verdict = check.checked(inputs, mode, rule, truth, [1, 2])
        assert verdict.wrong == 0
        if mode is rule.ours:
            whole = shape.dtypes[0] in (torch.float32, torch.float64)
            bits = whole and rule.ours.optimizer is fastsgd.SGD
            assert verdict.identical is (True if bits else None)


@each_dtype
@each_rule
def test_one_element_not_stepped_is_found_wrong(shape: Shape, rule: Rule) -> None:
    inputs = Inputs.random(shape)
    truth = check.reference(inputs, rule)
    _, verdict = check.checked(inputs, lazy(rule), rule, truth, [1])
    assert verdict.wrong == 1


@each_rule
def test_a_slightly_other_rule_is_found_wrong(rule: Rule) -> None:
    inputs = Inputs.random(SMALL)
    truth = check.reference(inputs, rule)
    other = replace(rule.ours, options={"weight_decay": 0.011})
    _, verdict = check.checked(inputs, other, rule, truth, [1])
    assert verdict.wrong > SMALL.elements / 2


def test_pieces_are_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PIECE", 10)
    start = torch.ones(3, 11)
    for at in range(33):
        result = start + 1
        result.view(-1)[at] = 1
        assert check.judged([start], [start + 1], [result], SGD) == check.Verdict(1, False)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="a bug of 2.13")
def test_stock_fused_in_bfloat16_is_found_wrong_and_not_the_best() -> None:
    row = steps.step_row(Inputs.random(SMALL_HALF), SGD, HASTE)
    assert list(row.wrong) == ["fused"]
    assert row.best is not None and row.best.mode != "fused"
    assert [rival.race for rival in row.rivals if rival.mode == "fused"] == [None]


def test_a_wrong_rival_is_not_raced() -> None:
    rule = replace(SGD, rivals=(SGD.rivals[0], lazy(SGD)))
    row = steps.step_row(Inputs.random(SMALL), rule, HASTE)
    assert [(rival.mode, rival.race is None) for rival in row.rivals] == [
        ("default", False),
        ("lazy", True),
    ]
    assert row.wrong == {"lazy": 1}
    assert "lazy: 1 elements wrong" in report.line(row)


def test_no_rival_is_right() -> None:
    row = steps.step_row(Inputs.random(SMALL), replace(SGD, rivals=(lazy(SGD),)), HASTE)
    assert row.best is None
    assert "no mode is right" in report.line(row)


@each_rule
def test_our_own_wrong_result_ends_the_run(
    rule: Rule, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RULES, rule.name, replace(rule, ours=lazy(rule)))
    options = ["--sections", "steps", "--model", "lesson", "--optimizer", rule.name]
    assert bench.main(options) == 1
    assert "fastsgd has 1 of 15 elements wrong" in capsys.readouterr().err


# --- Opponents --------------------------------------------------------------------------------


class Fake(torch.optim.AdamW):
    """An opponent that does as stock does, with its learning rate in a tensor."""

    def __init__(self, params, lr, betas, eps, weight_decay, kahan_sum):
        assert (betas, eps, kahan_sum) == ((0.9, 0.999), 1e-8, False)
        super().__init__(params, torch.tensor(lr), betas, eps, weight_decay)


class Broken(torch.optim.Adam):
    """An opponent that cannot step."""

    def __init__(self, params, lr, **options):
        super().__init__(params, lr)

    def step(self, closure=None):
        raise ZeroDivisionError


def broken_import(name: str) -> object:
    """Fail as the import of a library that is there but does not work."""
    if name.startswith("deepspeed"):
        raise OSError("libcuda.so is missing")
    return import_module(name)


@pytest.fixture
def optimi(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A library in the place of optimi, and none in that of the others."""
    module = types.ModuleType("optimi")
    module.__version__ = "1.2"
    module.AdamW, module.Adam = Fake, Broken
    monkeypatch.setitem(sys.modules, "optimi", module)
    for name in ("deepspeed", "bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
    return module


def test_opponents_are_found_or_left_out_with_a_word(
    optimi: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opponents, "import_module", broken_import)
    found, words = opponents.found()
    assert [opponent.name for opponent in found] == ["optimi"]
    assert words == {
        "deepspeed": "OSError",
        "optimi": "1.2",
        "bitsandbytes": "not installed",
        "torchao": "not installed",
    }


def test_an_opponent_names_rules_that_there_are() -> None:
    for opponent in opponents.OPPONENTS:
        assert opponent.classes.keys() <= RULES.keys()
        for shape, some in ((SMALL, True), (SMALL_HALF, True), (SMALL_MIXED, False)):
            assert any(opponent.enters(rule, shape) for rule in RULES.values()) is some


def test_opponents_have_lines_of_their_own(
    optimi: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    options = ["--sections", "steps", "--model", "lesson", "--seconds-per-case", "0.01"]
    rules = ["--optimizer", "adamw", "adam", "sgd", "rmsprop"]
    assert bench.main([*options, *rules, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "optimi 1.2" in printed and "torchao not installed" in printed
    found = json.loads(path.read_text())
    assert found["opponents"]["optimi"] == "1.2"
    adamw, adam, sgd, rmsprop = found["steps"]
    assert adamw["opponents_over_ours"]["optimi"] > 0 and not adamw["failures"]
    assert adamw["stock_over_ours"] == min(r["race"]["ratio"]["median"] for r in adamw["rivals"])
    assert adam["failures"] == {"optimi": "ZeroDivisionError"} and not adam["opponents"]
    assert sgd["failures"] == {"optimi": "AttributeError"}
    assert not rmsprop["failures"] and not rmsprop["opponents"]
    lines = [line.split() for line in printed.splitlines() if line.startswith(" ")]
    assert [words[:2] for words in lines[1:]] == [
        ["optimi", "ZeroDivisionError"],
        ["optimi", "AttributeError"],
    ]
    assert float(lines[0][1]) > 0


def test_a_wrong_opponent_is_not_raced(optimi: types.ModuleType) -> None:
    rule = RULES["adamw"]
    optimi.AdamW = lambda *args, kahan_sum, **options: lazy(rule).optimizer(*args, **options)
    row = steps.step_row(Inputs.random(SMALL), rule, HASTE, opponents.found()[0])
    assert row.wrong == {"optimi": 1} and row.best_opponents == {"optimi": None}
    assert [line.split() for line in report.opponent_lines(row)] == [["optimi", "wrong"]]
    assert row.best is not None


# --- Timing -----------------------------------------------------------------------------------


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    """A runner whose call takes exactly so many seconds, by a clock that nothing else moves."""
    now = [0.0]

    def take(seconds: float, called: Callable[[], object] = lambda: None) -> None:
        now[0] += seconds
        called()

    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    return lambda *seconds_called: Runner(lambda: take(*seconds_called), threads=1)


def test_a_race_alternates_and_divides_pairs(takes: Callable[..., Runner]) -> None:
    order: list[str] = []
    ours = takes(0.25, lambda: order.append("a"))
    rival = takes(0.75, lambda: order.append("b"))
    found = race(ours, rival, Effort(0.0, pairs=4))
    assert "".join(order) == "ab" + "ab" * 4
    assert found.pairs == 4
    assert found.ratio == Spread(3.0, 3.0, 3.0)
    assert (found.ours_us, found.rival_us) == (0.25e6, 0.75e6)


def test_a_race_goes_on_for_its_time(takes: Callable[..., Runner]) -> None:
    assert race(takes(0.25), takes(0.75), Effort(6.5, pairs=2)).pairs == 7


def test_a_short_call_is_repeated_and_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    calls: list[int] = []
    runner = Runner(lambda: calls.append(torch.get_num_threads()), threads=before + 1)
    race(runner, Runner(lambda: None, threads=before), Effort(0.0, pairs=2))
    assert runner.repeats > 10
    assert set(calls) == {before + 1}
    assert torch.get_num_threads() == before


def test_what_is_prepared_is_called_once_each_time() -> None:
    order: list[str] = []
    runner = Runner(lambda: order.append("call"), 1, lambda: order.append("prepare"))
    race(runner, Runner(lambda: None, threads=1), Effort(0.0, pairs=3))
    assert order == ["prepare", "call"] * (len(order) // 2)


@pytest.mark.parametrize(("seconds", "pairs"), [(0.5, 9), (0.625, 2)])
def test_a_hopeless_race_is_broken_off(
    seconds: float, pairs: int, takes: Callable[..., Runner]
) -> None:
    assert race(takes(0.25), takes(seconds), Effort(0.0, pairs=9), best=1.0).pairs == pairs


def test_backward_makes_each_gradient_anew() -> None:
    training = Training(Inputs.random(SMALL), SGD.ours, SGD)
    addresses: set[int] = set()
    training.backward()
    for _ in range(2):
        before = {p.grad.data_ptr() for p in training.parameters}
        training.backward()
        addresses = {p.grad.data_ptr() for p in training.parameters}
        assert not before & addresses
        for p, x in zip(training.parameters, training.inputs, strict=True):
            assert torch.equal(p.grad, x)


@each_rule
def test_the_timed_steps_move_little(rule: Rule) -> None:
    inputs = Inputs.random(SMALL)
    optimizer, _ = check.checked(inputs, rule.ours, rule, check.reference(inputs, rule), [1])
    before = [p.detach().clone() for p in parameters_of(optimizer)]
    for _ in range(3000):
        optimizer.step()
    for p, was in zip(parameters_of(optimizer), before, strict=True):
        torch.testing.assert_close(p.detach(), was, rtol=0, atol=1e-3)


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cc") is None, reason="the counting malloc needs a C compiler")
def test_a_warm_step_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    preload.skip_unless_possible()
    monkeypatch.delenv(preload.TRACER, raising=False)
    found = {(m.shape, m.what, m.mode): m for m in memory(2)}
    for shape in ("1000x16", "mobilenet-v3"):
        for what, states in (("momentum, wd", 1), ("AdamW", 2), ("AdamW, all four", 3)):
            ours, stock = found[shape, what, "fastsgd"], found[shape, what, "default"]
            assert ours.allocations == 0
            assert ours.peak_bytes is None or ours.peak_bytes < 1 << 20
            assert stock.allocations is not None and stock.allocations > 1000
            counters = 4 * SHAPES[shape].tensors if what.startswith("AdamW") else 0
            assert ours.state_bytes == states * ours.gradient_bytes + counters
            assert ours.held_bytes is None or ours.held_bytes < ours.state_bytes + (8 << 20)
