"""The lesson: what it prints, what it saves, and what it does when something is amiss."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsgd
from fastsgd import demo
from fastsgd.demo import digits, lesson

SIGNATURES = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


def losses(text: str) -> dict[int, float]:
    """The epochs and losses of lines like `epoch 100: loss 0.005`."""
    found = re.findall(r"epoch +(\d+): loss (\S+)", text)
    return {int(epoch): float(loss) for epoch, loss in found}


def words(text: str) -> str:
    """The text as one line: a paragraph may be broken anywhere."""
    return " ".join(text.split())


def test_gradients_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.gradients_add_up()
    grads = re.findall(r"w\.grad = (\S+)", capsys.readouterr().out)
    assert grads == ["2", "4", "6", "None", "2", "0"]


def test_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.by_hand(seed=0)
    text = capsys.readouterr().out
    loss = losses(text)
    assert list(loss) == [1, 100, 200, 300]
    assert loss[1] > 2 and loss[300] < 1e-6
    assert sorted(loss.values(), reverse=True) == list(loss.values())
    assert "| def fit(" in text and "optimizer.zero_grad()" in text


def test_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.as_a_module(seed=0)
    text = capsys.readouterr().out
    loss = losses(text)
    assert list(loss) == [1, 100, 200, 300]
    assert loss[1] < 1 and loss[300] < 1e-6
    assert "| class LinearRegression(nn.Module):" in text


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_whole(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / f"both.{suffix}"
    torch.set_num_threads(2)
    assert demo.main(["--epochs", "4", "--seed", "7", "--out", str(picture)]) == 0
    assert torch.get_num_threads() == 2
    text = words(capsys.readouterr().out)
    assert "the same to the last bit: all 180 losses" in text
    assert re.search(r"the median of 180 pairs", text)
    right = re.findall(r"reads (\d+) of 357 new digits rightly", text)
    assert len(right) == 2 and right[0] == right[1] and int(right[0]) > 250
    assert str(picture) in text
    assert picture.read_bytes().startswith(SIGNATURES[suffix])


def test_seed_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 2, 1):
        lesson.by_hand(seed)
        lesson.as_a_module(seed)
        digits.report_bits(*digits.race(seed, epochs=1))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] != texts[1]


def test_every_part_trains_with_fastsgd(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    class Counted(fastsgd.SGD):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            made.append(sum(len(group["params"]) for group in self.param_groups))

    monkeypatch.setattr(fastsgd, "SGD", Counted)
    assert demo.main(["--epochs", "1", "--out", str(tmp_path / "both.png")]) == 0
    assert made == [1, 2, 2, 6]


class OneBitOff(torch.optim.SGD):
    """Stock, but for the last bit of one weight."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step, then move the first number of the first parameter to its neighbour."""
        super().step(closure)
        first = self.param_groups[0]["params"][0].data.view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor([math.inf])))


def test_a_difference_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastsgd, "SGD", OneBitOff)
    picture = tmp_path / "both.png"
    assert demo.main(["--epochs", "1", "--out", str(picture)]) == 1
    text = words(capsys.readouterr().out)
    assert "THE TWO DIFFER" in text and "same to the last bit" not in text
    assert picture.exists()


def test_bits() -> None:
    numbers = torch.tensor([0.0, -0.0, math.nan])
    assert digits.bits(numbers)[0] != digits.bits(numbers)[1]
    assert digits.bits(numbers)[2] == digits.bits(numbers.clone())[2]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.mark.parametrize(
    "stream, patience, shown",
    [(Terminal, 0.0, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)],
    ids=["slow", "quick", "no terminal"],
)
def test_progress_bar(
    stream: type[io.StringIO],
    patience: float,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(digits, "PATIENCE_SECONDS", patience)
    monkeypatch.setattr(sys, "stderr", stream())
    digits.race(seed=0, epochs=2)
    assert ("training" in sys.stderr.getvalue()) == shown  # type: ignore[attr-defined]


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn", "tqdm"])
def test_missing_extra(missing: str) -> None:
    code = f"""if True:
        import sys
        from importlib.machinery import PathFinder

        find = PathFinder.find_spec
        PathFinder.find_spec = staticmethod(
            lambda name, *rest: None if name == {missing!r} else find(name, *rest)
        )
        from fastsgd.__main__ import main
        sys.exit(main(["demo"]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "(c) The same as a module" in done.stdout and len(losses(done.stdout)) == 4
    assert "(d)" not in done.stdout
    assert repr(missing) in done.stderr and 'pip install "fastsgd[demo]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_default_picture(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastsgd", "demo", "--epochs", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["fastsgd-demo.png"]


def test_picture_that_cannot_be_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fastsgd.demo.picture.save", full)
    assert demo.main(["--epochs", "1", "--out", str(tmp_path / "both.png")]) == 1
    error = capsys.readouterr().err
    assert "no space left on device" in error and "--out" in error


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--epochs", "0"], "--epochs: 0 is less than 1"),
        (["--epochs", "few"], "--epochs: 'few' is not an integer"),
        (["--seed", "-1"], "--seed: -1 is not between"),
        (["--seed", str(2**63)], "is not between"),
        (["--seed", "1.5"], "--seed: '1.5' is not an integer"),
        (["--out", "both.txt"], "'both.txt' does not end in .pdf, .png or .svg"),
        (["--out", "no/such/both.png"], "there is no folder"),
        (["--lr", "1"], "unrecognized arguments"),
    ],
)
def test_bad_options(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        demo.main(options)
    assert end.value.code == 2
    text = capsys.readouterr()
    assert complaint in text.err and not text.out


def test_folder_as_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "both.png"
    folder.mkdir()
    with pytest.raises(SystemExit):
        demo.main(["--out", str(folder)])
    assert "is a folder" in capsys.readouterr().err
