"""`make gpu-check`, as far as it goes without a device: what it keeps, and of what it tells."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS
from oracle import all_params
from places import on_host
from source_tree import ROOT, require_source

import fastsgd
from fastsgd import _C
from fastsgd.bench.device import asked_of_device, counted
from fastsgd.bench.shapes import Shape

require_source()
sys.path.append(str(ROOT / "benchmarks"))

import command  # noqa: E402
import gpu_check  # noqa: E402
import on_cuda  # noqa: E402
import sanitized  # noqa: E402
from kept import keep  # noqa: E402

LATER = math.inf  # the time until which all is to be done


def python(code: str) -> list[str]:
    """Return a command."""
    return [sys.executable, "-c", code]


# --- commands -----------------------------------------------------------------------------------


def test_output_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "folder" / "log.txt"
    code = r"import os, sys; os.write(1, b'\xff one\n'); print(os.environ['IT'], file=sys.stderr)"
    assert command.run([*python(code + "; sys.exit(3)")], log, 60, {"IT": "two"}) == 3
    assert log.read_bytes() == b"\xff one\ntwo\n"
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER} one\ntwo\n"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_command_that_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    """It may say how far it came; what it had said is kept, and what it started is gone."""
    monkeypatch.setattr(command, "GRACE", 1.0 if deaf else 30.0)
    code = f"""
import os, signal, subprocess, sys, time
if {deaf}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("begun", child.pid)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("so far")
"""
    log = tmp_path / "log.txt"
    start = time.monotonic()
    assert command.run(python(code), log, 4.0, {}) == command.TIMED_OUT
    assert time.monotonic() - start < 30
    text = log.read_text()
    assert ("so far" in text) is not deaf and text.endswith("\nnot done after 4 s\n")
    child = int(re.match(r"begun (\d+)", text)[1])
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):  # an orphan is waited for by others
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child is there")


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    check = gpu_check.Check(["no-such-command"], limit=60)
    found = gpu_check.outcome(check, tmp_path / "log.txt", LATER)
    assert found["outcome"].startswith("FAILED (127): ") and "no-such-command" in found["outcome"]


@pytest.mark.parametrize(
    ("code", "says", "outcome"),
    [
        ("", "", "nothing printed"),
        ("print('one', 'two', sep=chr(10))", "", "two"),
        ("print('2 hazards')", "0 hazards", "FAILED (0): 2 hazards"),
        ("raise SystemExit('no')", "", "FAILED (1): no"),
    ],
)
def test_outcome(tmp_path: Path, code: str, says: str, outcome: str) -> None:
    check = gpu_check.Check(python(code), limit=60, says=says)
    found = gpu_check.outcome(check, tmp_path / "log.txt", LATER)
    assert found["outcome"] == outcome and found["output"] == "log.txt"


def test_failed_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_well(): pass\ndef test_ill(): assert 1 == 2\n")
    check = gpu_check.tests(tmp_path)["tests"]
    words = [*check.words[: check.words.index("-k")], "-c", os.devnull, tmp_path / "test_it.py"]
    found = gpu_check.outcome(replace(check, words=words), tmp_path / "log.txt", LATER)
    assert found["outcome"].startswith("FAILED (1): 1 failed, 1 passed")
    (failed,) = found["failed"]
    assert failed.endswith("test_it.py::test_ill - assert 1 == 2")


# --- what is kept -------------------------------------------------------------------------------


def test_facts_are_added(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "found.json"
    keep(path, {"a": 1, "b": [1]})
    keep(path, {"b": [2], "c": {}})
    assert json.loads(path.read_text()) == {"a": 1, "b": [2], "c": {}}
    with pytest.raises(TypeError):
        keep(path, {"d": object()})
    assert json.loads(path.read_text()) == {"a": 1, "b": [2], "c": {}}


def test_parts_are_added_to_the_file_of_the_day_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order; one that is begun and not ended is a failure."""
    seen: list[tuple[str, Any]] = []

    def part(name: str, status: int) -> Any:
        def checks(path: Path) -> dict[str, gpu_check.Check]:
            seen.append((name, json.loads(path.read_text()).get("tests")))
            return {name: gpu_check.Check(python(f"print({name!r}); exit({status})"), limit=60)}

        return checks

    parts = {"tests": part("tests", 1), "bench": part("bench", 0)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(fastsgd, "cuda_available", lambda: True)
    monkeypatch.setattr(gpu_check.info, "facts", lambda: {"fastsgd": "1"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    to = ["--results", str(tmp_path)]
    assert gpu_check.main(["tests", *to]) == 1
    assert gpu_check.main(["bench", *to]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == f"{time.strftime('%Y-%m-%d')}-cuda-h100-80gb-hbm3.json"
    found = json.loads(path.read_text())
    assert found["tests"]["outcome"] == "FAILED (1): tests" and found["bench"]["outcome"] == "bench"
    assert found["device"] == "NVIDIA H100 80GB HBM3" and found["info"] == {"fastsgd": "1"}
    assert path.with_name(found["tests"]["output"]).read_text() == "tests\n"
    seen.clear()
    assert gpu_check.main(to) == 1
    assert [name for name, _ in seen] == ["tests", "bench"]
    assert seen[0][1]["outcome"] == "FAILED (1): tests", "the other parts stay"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu_check, "outcome", lambda check, log, end: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu_check.main(["bench", *to])
    other = path.with_name(path.name.replace("h100-80gb-hbm3", "h200"))
    assert json.loads(other.read_text())["bench"]["outcome"].startswith("FAILED (124): begun")
    assert json.loads(path.read_text())["tests"] == found["tests"] | {
        "seconds": json.loads(path.read_text())["tests"]["seconds"]
    }
    with pytest.raises(SystemExit):
        gpu_check.main(["nonsense", *to])


def test_without_a_device_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(fastsgd, "cuda_available", lambda: False)
    assert gpu_check.main(["--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("There is nothing to check: CUDA ")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_had_has_not_failed(tmp_path: Path) -> None:
    check = gpu_check.sanitizers(tmp_path)["memcheck"]
    code = (
        "print('Error: Device not supported. Look it up', 'ERROR SUMMARY: 2 errors', sep=chr(10))"
    )
    found = gpu_check.outcome(replace(check, words=python(code)), tmp_path / "log.txt", LATER)
    assert found["outcome"] == "cannot be had here: Error: Device not supported. Look it up"
    code = "print('Invalid write; Device not supported', 'ERROR SUMMARY: 3 errors', sep=chr(10))"
    found = gpu_check.outcome(replace(check, words=python(code)), tmp_path / "log.txt", LATER)
    assert found["outcome"] == "FAILED (0): ERROR SUMMARY: 3 errors"


def test_all_parts_end_in_time(tmp_path: Path) -> None:
    """Each by itself, by its limit or by what is left, with the time of grace of those killed."""
    parts = [part(Path("found.json")) for part in gpu_check.PARTS.values()]
    assert sum(max(c.limit for c in part.values()) for part in parts) <= 480
    check = gpu_check.Check(python("import time; time.sleep(600)"), limit=600)
    for left, outcome in (
        (1.0, "FAILED (124): not done after"),
        (0.0, "FAILED: there was no time"),
    ):
        end = time.monotonic() + left + command.GRACE
        found = gpu_check.outcome(check, tmp_path / "log.txt", end)
        assert found["outcome"].startswith(outcome)


def test_tests_for_a_device_are_selected() -> None:
    """All of those, what is documented for one, and hardly any else."""
    words = [str(word) for word in gpu_check.tests(Path("found.json"))["tests"].words]
    if "-n" in words:
        del words[words.index("-n") : words.index("-n") + 2]
    done = subprocess.run(
        [*words, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    selected = re.findall(r"^tests/test_(\w+)\.py::(\S.*)", done.stdout, re.MULTILINE)
    names = {f"{file}::{test}" for file, test in selected}
    assert "loops::test_example[cuda_graph.py]" in names and "loops::test_example[amp.py]" in names
    assert "docs::test_code[docs/cuda-graphs.md-cuda]" in names
    assert "bench_command::test_a_run_on_a_device" in names
    assert "cuda::test_more_than_2_31_elements" in names, "the slow one too"
    for file in ("device", "device_one_pass"):
        of_file = [test for where, test in selected if where == file]
        assert len(of_file) > 100 and all(re.search(r"[\[-]cuda[\]-]", test) for test in of_file)
    others = [name for name in names if not name.startswith(("cuda::", "device"))]
    assert len(others) < 25, others


# --- the benchmark ------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lines, of little work."""
    monkeypatch.setattr(on_cuda, "MORE_SHAPES", {n: Shape(n, ((7,), (3,))) for n in ("a", "b")})
    bars = [on_cuda.Bar("host_us", 1e9), on_cuda.Bar("of_copy", 1)]
    monkeypatch.setattr(on_cuda, "BARS", [("a", "sgd", bars), ("b", "adamw", bars)])
    monkeypatch.setattr(on_cuda, "PAIRS", 2)


def test_every_line_is_kept(small: None, tmp_path: Path) -> None:
    """Beside what is there of other parts; a figure that nobody took misses nothing."""
    path = tmp_path / "found.json"
    keep(path, {"tests": 1, "lines": ["an earlier one"]})
    assert on_cuda.main(["--device", "cpu", "--model", "a", "b", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["tests"] == 1 and found["device"] == "the CPU"
    assert [(line["shape"], line["error"]) for line in found["lines"]] == [("a", None), ("b", None)]
    for line in found["lines"]:
        assert [verdict for _, verdict in line["bars"]] == ["met", "not measured"]
        assert line["figures"].keys() >= {"host_us", "host_ratio", "total_ratio"}


def test_an_error_ends_its_line_alone(
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong results, and what torch raises: the first is the last of its line, and no more."""
    path = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--model", "a", "b", "--json", str(path)]
    kept = []

    def wrong(shape: Shape, *_: Any) -> int:
        kept.append(path.exists() and len(json.loads(path.read_text())["lines"]))
        return 5 if shape.name == "a" else 0

    monkeypatch.setattr(on_cuda, "check", wrong)
    assert on_cuda.main(arguments) == 1
    assert kept == [False, 1], "each line is written before the next is begun"
    first, second = json.loads(path.read_text())["lines"]
    assert first["error"] == "WrongResultError: 5 elements are wrong; nothing is timed."
    assert not first["figures"] and [v for _, v in first["bars"]] == ["not measured"] * 2
    assert second["error"] is None and second["figures"]
    assert "FAILED: WrongResultError" in capsys.readouterr().out


def test_a_lost_device_ends_the_run(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    real = on_cuda.measure

    def then_lost(line: Any, **arguments: Any) -> None:
        real(line, **arguments)
        monkeypatch.setattr(on_cuda.Timer, "wait", lose)

    def lose(self: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nadvice")

    monkeypatch.setattr(on_cuda, "measure", then_lost)
    assert on_cuda.main(["--device", "cpu", "--model", "a", "b", "--json", str(path)]) == 1
    (line,) = json.loads(path.read_text())["lines"]
    assert line["error"].endswith("lost: RuntimeError: CUDA error: unspecified launch failure")
    assert line["figures"]["host_us"] > 0


@pytest.mark.parametrize(
    ("figure", "value", "verdict"),
    [
        ("host_us", 24, "met"),
        ("host_us", 26, "MISSED"),
        ("host_us", None, "not measured"),
        ("fused_ratio", 24, "MISSED"),
        ("fused_ratio", 26, "met"),
        ("fused_ratio", None, "not measured"),
    ],
)
def test_verdicts(figure: str, value: float | None, verdict: str) -> None:
    line = on_cuda.Line("shape", "rule", {} if value is None else {figure: value})
    line.judge([on_cuda.Bar(figure, 25)])
    assert [v for _, v in line.bars] == [verdict] and line.well is (verdict != "MISSED")
    assert verdict in str(line)


# --- what is asked of a device ------------------------------------------------------------------


def test_waits() -> None:
    """Among them copies that are waited for, but not those that are not."""
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemcpyAsync", "cudaMemcpy"]
    names += ["cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::add", "cudaMemsetAsync"]
    assert counted(names) == {"launches": 2, "copies": 3, "waits": 3}


def test_waits_of_the_profiler_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsgd.bench import device

    def calls(act: Any) -> list[str]:
        return [*(act() or []), "cudaDeviceSynchronize"]

    monkeypatch.setattr(device, "_calls", calls)
    device._waits_of_profiler.cache_clear()
    assert asked_of_device(lambda: ["cudaMemcpy"]) == {"launches": 0, "copies": 1, "waits": 1}
    assert asked_of_device(list) == {"launches": 0, "copies": 0, "waits": 0}
    device._waits_of_profiler.cache_clear()


# --- what a sanitizer sees ----------------------------------------------------------------------


@on_host
def test_the_sanitized_run(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs where the host does what a device would, and leaves the host as it was."""
    before = _C.emulated_work()
    assert sanitized.main(["--device", "cpu"]) == 0
    says = gpu_check.sanitizers(Path("found.json"))["memcheck"].says
    assert re.search(says, capsys.readouterr().out + "===== ERROR SUMMARY: 0 errors\n")
    after = _C.emulated_work()
    launches, _, large, tables = (a - b for a, b in zip(after, before, strict=True))
    assert launches > 1000
    # Each kernel with large arguments, where small ones do not do; and more than those hold.
    assert large >= len(sanitized.STRUCTURES) * len(sanitized.DTYPES) and tables
    optimizer = fastsgd.SGD([torch.nn.Parameter(torch.ones(3))])
    all_params(optimizer)[0].grad = torch.ones(3)
    assert _C.step(optimizer) and _C.emulated_work() == after


def test_every_structure_is_there() -> None:
    """All sets of states that a rule can have."""

    def states(cls: type, options: Any) -> tuple[str, frozenset[str]]:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = cls([p], **{"lr": 0.1, **options})
        optimizer.step()
        made = optimizer.state[p].items()
        return cls._rule, frozenset(name for name, value in made if value is not None)

    known = {states(row.ours, options) for row in OPTIMIZERS for options in row.structures}
    assert {states(cls, options) for cls, options in sanitized.STRUCTURES} == known
