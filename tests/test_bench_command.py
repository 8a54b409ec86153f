"""`python -m fastsgd bench`: what its options choose, what it prints, writes and refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastsgd
from fastsgd import bench
from fastsgd.bench import check, measure, report, scaling, sections, steps
from fastsgd.bench.contest import Row, Settings
from fastsgd.bench.contestants import Inputs
from fastsgd.bench.measure import Effort
from fastsgd.bench.rules import RULES
from fastsgd.bench.schedule import SECTIONS
from fastsgd.bench.shapes import SHAPES, Shape

SMALL = Shape("small", ((64, 3), (33,), (1,)))
HASTE = Settings(1, Effort(seconds=0.0, pairs=2))


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections' shapes, small."""
    monkeypatch.setattr(bench, "QUICK_SHAPES", ["lesson"])
    few = [shape for shape in scaling.shapes(quick=True) if shape.elements <= 640]
    monkeypatch.setattr(scaling, "shapes", lambda quick: few)
    monkeypatch.setattr(sections, "SHAPE", Shape("1000x16", ((16,),) * 5))
    monkeypatch.setattr(sections, "GROUPED", Shape("465-groups", ((8,),) * 5, groups=(1,) * 5))
    monkeypatch.setitem(sections.SHAPES, "2000x64", Shape("2000x64", ((64,),) * 5))


def test_a_tiny_run_prints_and_writes_everything(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    small_shapes: None,
) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", float("inf"))
    sections = ["steps", "scaling", "fresh", "zero-grad", "groups", "oversubscribed"]
    path = tmp_path / "found.json"
    picture = tmp_path / "found.svg"
    code = bench.main(
        ["--quick", "--seconds-per-case", "0.01", "--threads", "2", "--json", str(path)]
        + ["--plot", str(picture), "--sections", *reversed(sections)]
    )
    printed = capsys.readouterr().out
    assert code == 0
    for heading in ("lesson", "momentum, wd", "set_to_none=False", "8 threads / 1 thread"):
        assert heading in printed
    assert "5 groups / 1 group" in printed
    found = json.loads(path.read_text())
    assert {"date", "torch", "fastsgd", "cpu", "threads", "load", "isa", "options"} <= found.keys()
    assert found["threads"] == 2 and found["device"] == "CPU"
    assert found["options"]["plot"] == str(picture) and found["options"]["device"] == "cpu"
    assert [name for name in found if name in sections] == sections
    assert [(row["shape"], row["what"]) for row in found["steps"]] == [
        ("lesson", RULES[rule].title) for rule in bench.QUICK_RULES
    ]
    assert [(row["shape"], row["tensors"], row["elements"]) for row in found["scaling"]] == [
        ("1x64", 1, 64),
        ("10x64", 10, 640),
        ("1x640", 1, 640),
    ]
    for row in found["scaling"]:
        assert row["bytes_moved"] == 28 * row["elements"]
        assert list(row["passes"]) == ["neg_, 1 thr", "neg_, 2 thr"] and len(row["copies"]) == 4
        copies, passes = (
            min(race["ratio"]["median"] for race in row[name].values())
            for name in ("copies", "passes")
        )
        assert row["copy_fraction"] == pytest.approx(copies * 7 / 4)
        assert row["floor_over_ours"] == pytest.approx(min(copies * 7 / 4, passes * 7 / 8))
    assert picture.read_text().startswith("<?xml")
    assert [row["what"] for row in found["fresh"]] == ["SGD", "momentum, wd", "AdamW"]
    assert len(found["zero-grad"]) == 2
    assert found["groups"].keys() == {"SGD", "AdamW", "RMSprop centered"}
    assert found["oversubscribed"].keys() == {"fastsgd", "fused"}
    for row in found["steps"] + found["scaling"] + found["fresh"] + found["zero-grad"]:
        check_row(row)


def check_row(row: dict) -> None:
    """What a reader of the JSON may rely on."""
    rule = next((r for r in RULES.values() if r.title == row["what"]), RULES["sgd"])
    entered = [(rival["mode"], rival["threads"]) for rival in row["rivals"]]
    assert entered == [(mode.name, count) for mode in rule.rivals for count in (1, 2)]
    medians = []
    for rival in row["rivals"]:
        result = rival["race"]
        assert result["pairs"] >= 2
        assert result["ours_us"] > 0 and result["rival_us"] > 0
        medians.append(result["ratio"]["median"])
    assert row["stock_over_ours"] == min(medians) > 0


def test_every_rule_is_timed(tmp_path: Path) -> None:
    found = run(tmp_path, "--model", "lesson", "--sections", "steps", "--optimizer", *RULES)
    assert [row["what"] for row in found["steps"]] == [rule.title for rule in RULES.values()]
    for row in found["steps"]:
        check_row(row)


def run(folder: Path, *options: str) -> dict:
    """What a short run with these options writes."""
    path = folder / "found.json"
    few = ["--seconds-per-case", "0.01", "--threads", "2", "--json", str(path)]
    assert bench.main([*options, *few]) == 0
    return json.loads(path.read_text())


def test_a_large_shape_is_compared_with_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shape, "large", property(lambda self: True))
    row = steps.step_row(Inputs.random(SMALL), RULES["momentum"], HASTE)
    assert (row.bytes_moved, row.copy_bytes) == (20 * SMALL.elements, 12 * SMALL.elements)
    assert row.copy_fraction is not None
    ratios = [race.ratio.median for race in row.copies.values()]
    assert row.copy_fraction == pytest.approx(min(ratios) * 20 / 12)


@pytest.mark.parametrize(
    ("options", "shape", "rules"),
    [
        ([], "lesson", list(RULES)),
        ([], "gpt-2", ["sgd", "momentum", "adamw", "rmsprop", "adagrad"]),
        (["--quick"], "lesson", ["sgd", "momentum", "adamw"]),
        (["--quick"], "gpt-2", []),
        (["--quick", "--model", "gpt-2", "--optimizer", "adam"], "gpt-2", ["adam"]),
    ],
)
def test_which_rules_a_shape_gets(options: list[str], shape: str, rules: list[str]) -> None:
    plan = bench.plan_of(bench.parse(options))
    assert [rule.name for of, rule in plan.cases if of.name == shape] == rules


def test_a_long_name_keeps_the_columns() -> None:
    found = [Row(name, 1, 1, "SGD", 1) for name in ("x" * 18, "y" * 30)]
    lines = [report.line(row) for row in found]
    assert lines[0].index("SGD") == lines[1].index("SGD") == report.HEADER.index("step")
    assert "x" * 18 in lines[0] and f"{'y' * 17}…" in lines[1]


def test_many_groups_beyond_their_limit_are_said_to_be() -> None:
    for ratio, said in ((1.1, False), (1.2, True)):
        found = measure.Race(measure.Spread(ratio, ratio, ratio), 1.0, ratio, 2)
        (line,) = report.groups_lines({"SGD": found})
        assert ("more than 1.15" in line) is said


def test_quick_begins_nothing_after_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    assert bench.main(["--quick"]) == 0
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sections"),
    [
        ([], list(SECTIONS)),
        (["--device", "cpu", "--threads", "1"], list(SECTIONS)),
        (["--sections", "groups", "fresh"], ["fresh", "groups"]),
        (["--model", "gpt-2"], ["steps", "one-pass"]),
        (["--my-model", "a:b"], ["steps"]),
        (["--optimizer", "sgd"], ["steps", "scaling"]),
        (["--dtype", "float64"], ["steps", "scaling"]),
        (["--against", "fused"], ["steps", "scaling"]),
        (["--against", "optimi"], ["steps"]),
        (["--model", "gpt-2", "--dtype", "float64"], ["steps"]),
    ],
)
def test_what_an_option_says_nothing_of_is_not_run(options: list[str], sections: list[str]) -> None:
    assert bench.parse(options).sections == sections


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "gpt-2", "--sections", "steps", "memory"], "not of the section memory"),
        (["--my-model", "a:b", "--sections", "scaling"], "--my-model speaks of steps, not of"),
        (["--dtype", "float16", "--sections", "groups"], "--dtype speaks of steps and scaling"),
        (["--against", "torchao", "--sections", "scaling"], "--against speaks of steps, not of"),
    ],
)
def test_a_section_that_an_option_says_nothing_of_is_refused(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(options)
    assert sentence in capsys.readouterr().err


def test_a_model_in_another_dtype(tmp_path: Path) -> None:
    found = run(tmp_path, "--model", "lesson", "--dtype", "bfloat16", "--optimizer", "adamw")
    assert [(row["shape"], row["what"]) for row in found["steps"]] == [("lesson-bf16", "AdamW")]
    plan = bench.plan_of(bench.parse(["--dtype", "bfloat16"]))
    names = [shape.name for shape, rule in plan.cases if rule.name == "sgd"]
    assert names == [f"{name}-bf16" for name in SHAPES if name != "gpt-2-bf16"]
    assert {shape.dtype for shape, _ in (*plan.cases, *plan.scaling)} == {torch.bfloat16}


def test_scaling_of_the_rules_named() -> None:
    plan = bench.plan_of(bench.parse(["--optimizer", "sgd", "adam"]))
    assert [rule.name for _, rule in plan.scaling[:4]] == ["sgd", "adam", "sgd", "adam"]
    assert [rule.name for _, rule in bench.plan_of(bench.parse([])).scaling[:2]] == ["adamw"] * 2


@pytest.mark.parametrize("quick", [True, False])
def test_the_two_series_have_equal_numbers_of_elements(quick: bool) -> None:
    shapes = scaling.shapes(quick)
    many = [shape.elements for shape in shapes if shape.elements == 64 * shape.tensors]
    one = [shape.elements for shape in shapes if shape.tensors == 1]
    assert many == one[: len(many)] and len(one) > len(many) > 3
    assert any(shape.large for shape in shapes) is not quick


def test_against_modes_that_a_rule_may_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "lesson", "--optimizer", "sgd", "rmsprop", "--against", "fused"]
    found = run(tmp_path, *options, "--sections", "steps")
    sgd, rmsprop = found["steps"]
    assert {rival["mode"] for rival in sgd["rivals"]} == {"fused"}
    assert not rmsprop["rivals"] and rmsprop["stock_over_ours"] is None
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "RMSprop" in line)
    assert line.split()[-2:] == ["not", "raced"]
    assert "opponents" not in printed and not found["opponents"]


def test_against_an_opponent_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("optimi")
    module.SGD = lambda params, lr, kahan_sum: torch.optim.SGD(params, lr)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optimi", module)
    options = ["--model", "lesson", "--optimizer", "sgd", "--against", "optimi"]
    (row,) = run(tmp_path, *options)["steps"]
    assert not row["rivals"] and row["opponents_over_ours"]["optimi"] > 0
    assert "opponents: optimi of unknown version\n" in capsys.readouterr().out


def test_against_an_opponent_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert bench.main(["--against", "fused", "torchao"]) == 1
    assert capsys.readouterr().err == (
        "torchao, named in --against, cannot be raced (not installed): run "
        '`pip install "fastsgd[opponents]"`.\n'
    )


@pytest.mark.parametrize("name", ["default", "optimi"])
def test_a_rival_that_raises_is_left_out_with_a_word(name: str) -> None:
    def raises(params: object, lr: float) -> None:
        raise RuntimeError("not on this device")

    rule = replace(RULES["sgd"], rivals=(replace(RULES["sgd"].rivals[0], name="fused"),))
    broken = replace(rule.rivals[0], name=name, optimizer=raises)
    row = steps.step_row(
        Inputs.random(SHAPES["lesson"]),
        replace(rule, rivals=(broken, *rule.rivals)),
        HASTE,
    )
    assert row.failures == {name: "RuntimeError"}
    assert [rival.mode for rival in row.rivals] == ["fused"] and row.best is not None
    assert [line.split() for line in report.opponent_lines(row)] == [[name, "RuntimeError"]]


# --- On a device ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "kernels", "device", "sentence"),
    [
        (0, False, "cuda", "there is no cuda: torch finds 0 CUDA devices"),
        (0, False, "cuda:1", "there is no cuda:1: torch finds 0 CUDA devices"),
        (1, True, "cuda:1", "there is no cuda:1: torch finds 1 CUDA devices"),
        (1, False, "cuda", "this build has no CUDA kernels: `python -m fastsgd info` says why"),
        (1, True, "cuda:0", None),
    ],
)
def test_a_device_is_there_or_one_sentence_says_so(
    devices: int,
    kernels: bool,
    device: str,
    sentence: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(fastsgd, "cuda_available", lambda: kernels)
    options = ["--device", device]
    if sentence is None:
        found = bench.parse(options)
        assert found.device == torch.device(device) and found.sections == ["steps", "scaling"]
    else:
        with pytest.raises(SystemExit):
            bench.parse(options)
        assert sentence in capsys.readouterr().err


def test_a_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", order.append)
    device = torch.device("cuda", 0)
    settings = Settings(2, Effort(seconds=0.0, pairs=2), device=device)
    assert settings.counts == [2]
    runner = settings.runner(lambda: order.append("call"), 2)
    runner.seconds()
    assert order == [device, "call", device]
    runner.repeats = 3
    runner.seconds()
    assert order[3:] == ["call", device, "call", "call", "call", device]


def test_what_is_on_a_device_is_there_whole() -> None:
    inputs = Inputs.random(SHAPES["465-groups"], torch.device("meta"))
    assert {x.device.type for x in (*inputs.parameters, *inputs.gradients)} == {"meta"}
    # Bits are those of the CPU.
    assert {x.dtype for x in check.reference(inputs, RULES["sgd"])} == {torch.float64}


@pytest.mark.skipif(not fastsgd.cuda_available(), reason="no CUDA device, or no kernels")
def test_a_run_on_a_device(tmp_path: Path) -> None:
    found = run(tmp_path, "--device", "cuda", "--model", "lesson", "2000x64")
    assert found["device"] == torch.cuda.get_device_name()
    assert all(row["stock_over_ours"] > 0 for row in found["steps"])


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--threads", "0"],
        ["--threads", "two"],
        ["--seconds-per-case", "-1"],
        ["--seconds-per-case", "nan"],
        ["--model", "alexnet"],
        ["--optimizer", "adadelta"],
        ["--dtype", "float8"],
        ["--device", "tpu"],
        ["--device", "meta"],
        ["--against", "apex"],
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
