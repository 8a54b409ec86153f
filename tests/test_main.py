"""The command line: which command runs with what, and the lines of `info`."""

from __future__ import annotations

import sys
from types import ModuleType

import isolated
import pytest
import torch

import fastsgd
from fastsgd import _build_info, info
from fastsgd.__main__ import COMMANDS, main

NAMES = [
    "fastsgd",
    "torch found",
    "compiled against",
    "compiler",
    "instruction set",
    "threads",
    "CUDA",
]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for, or where no command is given."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastsgd {fastsgd.__version__}\n"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["train"], "invalid choice: 'train'"),
        (["--quick", "bench"], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_commands(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_exit_code_are_the_commands_own(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    module = ModuleType(f"fastsgd.{command}")
    module.main = lambda argv: seen.append(argv) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"fastsgd.{command}", module)
    assert main([command, "--quick", "-h", "word"]) == 3
    assert seen == [["--quick", "-h", "word"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"python -m fastsgd {command}" in capsys.readouterr().out


def test_info_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:17].strip() for line in lines] == NAMES
    value = dict(zip(NAMES, (line[18:] for line in lines), strict=True))
    assert value["fastsgd"] == fastsgd.__version__
    assert value["torch found"].startswith(torch.__version__)
    assert value["compiled against"].startswith(torch.__version__.split("+")[0])
    assert value["compiler"] == _build_info.COMPILER
    assert value["instruction set"].split()[0] in ("baseline", "avx2", "avx512")
    assert f"torch.get_num_threads() is {torch.get_num_threads()})" in value["threads"]
    assert value["CUDA"].split(":")[0] == ("yes" if fastsgd.cuda_available() else "no")


def test_info_follows_the_threads_and_the_capability() -> None:
    text = isolated.run(
        """
        import torch
        from fastsgd.__main__ import main

        torch.set_num_threads(1)
        main(["info"])
        """,
        env={"ATEN_CPU_CAPABILITY": "default"},
    )
    assert "ATEN_CPU_CAPABILITY is 'default'" in text
    assert "baseline (torch uses DEFAULT" in text
    assert "1 (torch.get_num_threads() is 1)" in text


def test_info_without_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert info.capability().endswith("ATEN_CPU_CAPABILITY is not set")


def test_info_needs_no_extra() -> None:
    text = isolated.run(
        """
        import sys

        sys.modules.update(dict.fromkeys(["matplotlib", "sklearn", "tqdm"]))  # None: not found
        from fastsgd.__main__ import main

        main(["info"])
        """
    )
    assert len(text.splitlines()) == len(NAMES)


@pytest.mark.parametrize(
    "available, kernels, lack, line",
    [
        (True, "nvcc 13.0 for sm_90", None, "yes: A GPU, A GPU (kernels by nvcc 13.0 for sm_90)"),
        (
            False,
            None,
            "there was no nvcc",
            "no: when this was built, there was no nvcc; CUDA param",
        ),
        (False, "nvcc 13.0 for sm_90", None, "no: torch finds no CUDA device (kernels by nvcc 13"),
    ],
)
def test_cuda_or_why_not(
    available: bool,
    kernels: str | None,
    lack: str | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastsgd, "cuda_available", lambda: available)
    monkeypatch.setattr(_build_info, "CUDA_KERNELS", kernels)
    monkeypatch.setattr(_build_info, "NO_CUDA_KERNELS", lack)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert info.cuda().startswith(line)


@pytest.mark.parametrize("release, text", [("13.0", "CUDA 13.0"), (None, "CPU build")])
def test_cuda_release(release: str | None, text: str) -> None:
    assert info.cuda_release(release) == text
