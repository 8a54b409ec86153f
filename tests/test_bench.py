"""The benchmark: its shapes, its judgement of who is right, and a tiny run of all of it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from fastsgd import bench
from fastsgd.bench import check, contestants, measure, sections, steps
from fastsgd.bench.contest import Settings
from fastsgd.bench.contestants import OURS, RULES, STOCK, Inputs, Mode, Training, parameters_of
from fastsgd.bench.measure import Effort, Runner, race
from fastsgd.bench.memory import memory
from fastsgd.bench.shapes import SHAPES, Shape

SMALL = Shape("small", ((64, 3), (33,), (1,)))
SMALL_HALF = Shape("small", ((64, 3), (33,), (1,)), torch.bfloat16)
HASTE = Settings(1, Effort(seconds=0.0, pairs=2))


class Lazy(torch.optim.SGD):
    """Leaves one element of the first parameter as it was."""

    def step(self, closure=None):
        first = self.param_groups[0]["params"][0].detach().view(-1)
        kept = first[0].clone()
        super().step(closure)
        first[0] = kept


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections' shapes, small."""
    monkeypatch.setattr(sections, "SHAPE", Shape("1000x16", ((16,),) * 5))
    monkeypatch.setitem(sections.SHAPES, "2000x64", Shape("2000x64", ((64,),) * 5))


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


def test_bytes_moved() -> None:
    plain, momentum = RULES["sgd"], RULES["momentum"]
    assert plain.bytes_moved(SHAPES["resnet-50"]) == 12 * 25_557_032
    assert momentum.bytes_moved(SHAPES["resnet-50"]) == 20 * 25_557_032
    assert momentum.bytes_moved(SHAPES["gpt-2-bf16"]) == 10 * 124_439_808


def test_a_group_a_tensor() -> None:
    optimizer = Inputs.random(SHAPES["465-groups"]).optimizer(OURS, RULES["sgd"])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1] * 465


def test_inputs_are_the_same_each_time_and_never_zero() -> None:
    one, two = Inputs.random(SMALL_HALF), Inputs.random(SMALL_HALF)
    for a, b in zip(one.gradients, two.gradients, strict=True):
        assert torch.equal(a, b) and a.all()


# --- Who is right -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, SMALL_HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("mode", [OURS, *STOCK[:2]], ids=lambda mode: mode.name)
def test_a_right_result_is_found_right(shape: Shape, rule: contestants.Rule, mode: Mode) -> None:
    inputs = Inputs.random(shape)
    _, verdict = check.checked(inputs, mode, rule, check.reference(inputs, rule), [1, 2])
    assert verdict.wrong == 0
    if mode is OURS and shape.dtype == torch.float32:
        assert verdict.identical


@pytest.mark.parametrize("shape", [SMALL, SMALL_HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_one_element_not_stepped_is_found_wrong(shape: Shape, rule: contestants.Rule) -> None:
    inputs = Inputs.random(shape)
    truth = check.reference(inputs, rule)
    _, verdict = check.checked(inputs, Mode("lazy", Lazy), rule, truth, [1])
    assert verdict.wrong == 1


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="a bug of 2.13")
def test_stock_fused_in_bfloat16_is_found_wrong_and_not_the_best() -> None:
    row = steps.step_row(Inputs.random(SMALL_HALF), RULES["sgd"], HASTE)
    assert list(row.wrong) == ["fused"]
    assert row.best is not None and row.best.mode != "fused"
    assert [rival.race for rival in row.rivals if rival.mode == "fused"] == [None]


def test_a_wrong_rival_is_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STOCK", (STOCK[0], Mode("lazy", Lazy)))
    row = steps.step_row(Inputs.random(SMALL), RULES["sgd"], HASTE)
    assert [(rival.mode, rival.race is None) for rival in row.rivals] == [
        ("default", False),
        ("lazy", True),
    ]
    assert row.wrong == {"lazy": 1}
    assert "lazy: 1 elements wrong" in bench.report.line(row)


def test_no_rival_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STOCK", (Mode("lazy", Lazy),))
    row = steps.step_row(Inputs.random(SMALL), RULES["sgd"], HASTE)
    assert row.best is None
    assert "no mode is right" in bench.report.line(row)


def test_our_own_wrong_result_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "OURS", Mode("fastsgd", Lazy))
    assert bench.main(["--sections", "steps", "--shapes", "lesson"]) == 1
    assert "fastsgd.SGD has 1 of 15 elements wrong" in capsys.readouterr().err


# --- Timing -----------------------------------------------------------------------------------


def test_a_race_alternates_and_divides_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 1e-3)
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> Runner:
        return Runner(lambda: (order.append(name), time.sleep(seconds)), threads=1)

    found = race(sleeper("a", 0.002), sleeper("b", 0.006), Effort(0.0, pairs=4))
    assert "".join(order) == "ab" + "ab" * 4
    assert found.pairs == 4
    assert 1.5 < found.ratio.median < 4
    assert found.ratio.first_quartile <= found.ratio.median <= found.ratio.third_quartile


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


def test_a_hopeless_race_is_broken_off() -> None:
    slow = Runner(lambda: time.sleep(0.006), threads=1)
    quick = Runner(lambda: time.sleep(0.0025), threads=1)
    assert race(quick, slow, Effort(0.0, pairs=9), best=0.5).pairs == 2


def test_backward_makes_each_gradient_anew() -> None:
    training = Training(Inputs.random(SMALL), OURS, RULES["sgd"])
    addresses: set[int] = set()
    training.backward()
    for _ in range(2):
        before = {p.grad.data_ptr() for p in training.parameters}
        training.backward()
        addresses = {p.grad.data_ptr() for p in training.parameters}
        assert not before & addresses
        for p, x in zip(training.parameters, training.inputs, strict=True):
            assert torch.equal(p.grad, x)


def test_the_timed_learning_rate_moves_little() -> None:
    inputs, rule = Inputs.random(SMALL), RULES["momentum"]
    optimizer, _ = check.checked(inputs, OURS, rule, check.reference(inputs, rule), [1])
    before = [p.detach().clone() for p in parameters_of(optimizer)]
    for _ in range(1000):
        optimizer.step()
    for p, was in zip(parameters_of(optimizer), before, strict=True):
        torch.testing.assert_close(p.detach(), was, rtol=0, atol=1e-3)


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cc") is None, reason="the counting malloc needs a C compiler")
def test_a_warm_step_allocates_nothing() -> None:
    found = {m.mode: m.allocations for m in memory(2, ["lesson", "1000x16"])}
    assert found["fastsgd"] == 0
    assert found["default"] is not None and found["default"] > 1000


# --- The command ------------------------------------------------------------------------------


def test_a_tiny_run_prints_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_shapes: None
) -> None:
    path = tmp_path / "found.json"
    code = bench.main(
        ["--shapes", "lesson", "--seconds-per-case", "0.01", "--threads", "2", "--json", str(path)]
        + ["--sections", "steps", "fresh", "zero-grad", "oversubscribed"]
    )
    printed = capsys.readouterr().out
    assert code == 0
    for heading in ("lesson", "momentum, wd", "set_to_none=False", "8 threads / 1 thread"):
        assert heading in printed
    found = json.loads(path.read_text())
    assert {"date", "torch", "fastsgd", "cpu", "threads", "load", "isa", "options"} <= found.keys()
    assert found["threads"] == 2
    assert [row["what"] for row in found["steps"]] == [rule.title for rule in RULES.values()]
    assert len(found["fresh"]) == len(found["zero-grad"]) == 2
    assert found["oversubscribed"].keys() == {"fastsgd", "fused"}
    for row in found["steps"] + found["fresh"] + found["zero-grad"]:
        check_row(row)


def check_row(row: dict) -> None:
    """What a reader of the JSON may rely on."""
    entered = [(rival["mode"], rival["threads"]) for rival in row["rivals"]]
    assert entered == [(mode.name, count) for mode in STOCK for count in (1, 2)]
    medians = []
    for rival in row["rivals"]:
        result = rival["race"]
        assert result["pairs"] >= 2
        assert result["ours_us"] > 0 and result["rival_us"] > 0
        medians.append(result["ratio"]["median"])
    assert row["stock_over_ours"] == min(medians) > 0


def test_a_large_shape_is_compared_with_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shape, "large", property(lambda self: True))
    row = steps.step_row(Inputs.random(SMALL), RULES["momentum"], HASTE)
    assert (row.bytes_moved, row.copy_bytes) == (20 * SMALL.elements, 12 * SMALL.elements)
    assert row.copy_fraction is not None
    ratios = [race.ratio.median for race in row.copies.values()]
    assert row.copy_fraction == pytest.approx(min(ratios) * 20 / 12)


def test_quick_begins_nothing_after_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    assert bench.main(["--quick"]) == 0
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--threads", "0"],
        ["--threads", "two"],
        ["--seconds-per-case", "-1"],
        ["--seconds-per-case", "nan"],
        ["--shapes", "alexnet"],
        ["--optimizers", "adam"],
        ["--json", "no/such/folder/found.json"],
    ],
)
def test_bad_options_end_at_once(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(options)
    assert options[0] in capsys.readouterr().err


def test_without_tqdm_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert bench.main(["--quick"]) == 1
    assert 'pip install "fastsgd[bench]"' in capsys.readouterr().err
