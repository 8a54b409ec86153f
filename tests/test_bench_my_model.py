"""`python -m fastsgd bench --my-model module:factory`: what is taken of it, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fastsgd import bench
from fastsgd.bench import check, my_model
from fastsgd.bench.errors import BenchError

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).double())
    model[1].weight.requires_grad_(False)
    return model

def parameters():
    return net().parameters()

def named():
    return net().named_parameters()

def groups():
    model = net()
    return [
        {"params": model[0].weight, "weight_decay": 0.1},
        {"params": model[1].parameters()},
        {"params": list(model[2].parameters()), "lr": 3},
    ]

def on_meta():
    with torch.device("meta"):
        return net()

class Namespace:
    made = staticmethod(net)

model = net()
shown = None

def remembers():
    return model

kept = [{"params": model[0].weight}, {"params": [model[0].bias]}]

def remembers_groups():
    return kept

def nothing(): return None
def number(): return 3
def words(): return ["weight"]
def mapping(): return dict(model.named_parameters())
def empty(): return []
def frozen(): return nn.Linear(2, 2).requires_grad_(False)
def complicated(): return [nn.Parameter(torch.ones(2) * 1j)]
def lazy(): return nn.LazyLinear(2)
def twice(): return [{"params": model[0].weight}, {"params": model[0].weight}]
def argument(size): return nn.Linear(size, size)
def fails(): raise ValueError("no\\nweights")
def leaves(): raise SystemExit(2)
"""
SIZES = ((3, 5), (3,), (3,), (2, 3), (2,))
DTYPES = (torch.float32,) * 3 + (torch.float64,) * 2


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modules in it, the current one."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "breaks.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "asks.py").write_text("import not_there_either\n")
    (tmp_path / "ends.py").write_text("raise SystemExit('usage')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("models", "breaks", "asks", "ends"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("net", (5,)),
        ("parameters", (5,)),
        ("named", (5,)),
        ("groups", (1, 1, 2)),
        ("on_meta", (5,)),
        ("Namespace.made", (5,)),
    ],
)
def test_sizes_dtypes_and_groups_are_taken(name: str, groups: tuple[int, ...]) -> None:
    path = list(sys.path)
    shape = my_model.shape_of(f"models:{name}")
    assert shape.name == name and shape.groups == groups
    kept = (0, *range(2, 5)) if name == "groups" else range(5)
    assert shape.sizes == tuple(SIZES[number] for number in kept)
    assert shape.dtype == tuple(DTYPES[number] for number in kept)
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("not_there:net", "There is no module 'not_there', neither in {here} nor installed."),
        ("not_there.at_all:net", "There is no module 'not_there', neither in {here} nor"),
        ("models.net:x", "There is no module 'models.net', neither in {here} nor installed."),
        (
            "breaks:net",
            "Importing breaks raised ZeroDivisionError: division by zero ({here}/breaks.py,",
        ),
        ("asks:net", "Importing asks raised ModuleNotFoundError: No module named 'not_th"),
        ("ends:net", "Importing ends raised SystemExit: usage ({here}/ends.py, line 1)."),
        ("models:nett", "The module models has no attribute 'nett'."),
        ("models:Namespace.nett", "The module models has no attribute 'Namespace.nett'."),
        ("models:shown", "models:shown is None, which cannot be called: name a function."),
        ("models:MODELS", "The module models has no attribute 'MODELS'."),
        ("models:argument", "models:argument() raised TypeError: argument() missing 1 required"),
        ("models:fails", "models:fails() raised ValueError: no weights ({here}/models.py, line"),
        ("models:leaves", "models:leaves() raised SystemExit: 2 ({here}/models.py, line"),
        ("models:nothing", "models:nothing() returned None, and not a torch.nn.Module, parameters"),
        ("models:number", "models:number() returned an object of type int, and not"),
        ("models:words", "models:words() returned an object of type list, and not a"),
        ("models:mapping", "models:mapping() returned an object of type dict, and not a"),
        ("models:twice", "models:twice() returned an object of type list, and not a"),
        ("models:empty", "models:empty() returned no parameter that requires grad."),
        ("models:frozen", "models:frozen() returned no parameter that requires grad."),
        (
            "models:complicated",
            "models:complicated() returned parameters of torch.complex64: those",
        ),
        ("models:lazy", "models:lazy() returned lazy parameters, which have no size yet: let it"),
    ],
)
def test_one_sentence_says_what_is_wrong(
    name: str, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = list(sys.path)
    assert bench.main(["--my-model", name, "--quick"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(sentence.format(here=os.getcwd()))
    assert printed.err.count("\n") == 1 and not printed.out
    assert sys.path == path


@pytest.mark.parametrize("name", ["models", "models:", ":net"])
def test_it_is_a_module_and_a_factory(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--my-model", name])
    assert f"{name!r} is not module:factory" in capsys.readouterr().err


def state_of(model: nn.Module) -> list[object]:
    """All that a user could see change: values, grads, versions, flags, options."""
    return [
        (name, p.detach().clone().tolist(), p.grad, p._version, p.requires_grad, p.data_ptr())
        for name, p in model.named_parameters()
    ]


def test_the_model_is_timed_and_not_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--my-model", "models:remembers", "--optimizer", "adamw", "rmsprop"]
    options += ["--seconds-per-case", "0.01", "--json", "found.json", "--threads", "2"]
    my_model.shape_of("models:remembers")
    before = state_of(sys.modules["models"].model)
    assert bench.main(options) == 0
    assert state_of(sys.modules["models"].model) == before
    printed = capsys.readouterr().out
    line = "models:remembers: 5 tensors, 29 elements, float32, float64; groups: 1, with the options"
    assert line in printed
    found = json.loads((here / "found.json").read_text())
    assert [(row["shape"], row["what"]) for row in found["steps"]] == [
        ("remembers", "AdamW"),
        ("remembers", "RMSprop centered"),
    ]
    for row in found["steps"]:
        assert (row["tensors"], row["elements"]) == (5, 29)
        assert row["stock_over_ours"] > 0 and row["verdict"]["wrong"] == 0
    assert "scaling" not in found and not found["groups"]


def test_groups_are_not_written_into() -> None:
    assert my_model.shape_of("models:remembers_groups").groups == (1, 1)
    kept = sys.modules["models"].kept
    assert [group.keys() for group in kept] == [{"params"}] * 2
    assert isinstance(kept[0]["params"], torch.Tensor)


def test_it_is_checked_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., check.Verdict] = check.judged
    monkeypatch.setattr(check, "judged", lambda *args: check.Verdict(7, real(*args).identical))
    assert bench.main(["--my-model", "models:net", "--optimizer", "sgd"]) == 1
    assert "net, SGD: fastsgd has 7 of 29 elements wrong" in capsys.readouterr().err


def test_in_another_dtype_and_beside_a_model() -> None:
    options = bench.parse(["--my-model", "models:net", "--model", "lesson", "--dtype", "float16"])
    plan = bench.plan_of(options, my_model.shape_of(options.my_model))
    shapes = dict.fromkeys(shape for shape, _ in plan.cases)
    assert [shape.name for shape in shapes] == ["net-f16", "lesson-f16"]
    assert {dtype for shape in shapes for dtype in shape.dtypes} == {torch.float16}


def test_a_cause_is_kept_for_whoever_calls_it() -> None:
    with pytest.raises(BenchError) as raised:
        my_model.shape_of("models:fails")
    assert isinstance(raised.value.__cause__, ValueError)
