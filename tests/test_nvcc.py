"""The CUDA sources, compiled where nvcc is: no device is needed, and none is used."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from source_tree import ROOT, require_source
from torch.utils import cpp_extension

require_source()

from build_support import cuda, extension  # noqa: E402

KERNELS = ROOT / cuda.KERNELS
ARCHITECTURES = ["75", "80", "86", "90", "100", "120"]
# The build's, and what torch adds to them: what is looked at is what is built. Less what no code
# depends on: a cubin is of one architecture, and nothing packs it.
FLAGS = [flag for flag in cuda.FLAGS if not flag.startswith(("--threads", "-Xfatbin"))]
FLAGS += [*cpp_extension.COMMON_NVCC_FLAGS, f"-I{ROOT / 'csrc'}"]

NVCC = cuda.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@functools.cache
def cubin(architecture: str, folder: Path) -> tuple[Path, str]:
    """Compile the kernels; return the binary, and what the assembler reports of registers."""
    path = folder / f"kernels_{architecture}.cubin"
    beside = cuda.host_compiler(extension.find_compiler())
    command = [NVCC, *FLAGS, *beside, "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin"]
    command += [str(KERNELS), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr.lower(), done.stderr[-4000:]
    return path, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where binaries go."""
    return tmp_path_factory.mktemp("cubin")


# A multiprocessor has 65,536; so many leave room for four blocks of 256 threads.
REGISTERS_FOR_FOUR = 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled(architecture: str, folder: Path) -> None:
    """The kernels compile, none keeps registers in memory, and steps of float32 leave room.

    The last pack of a norm of halves is filled in memory, on architectures from 100 on.
    """
    _, report = cubin(architecture, folder)
    numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    frames = re.findall(rf"properties for (\S+)\s+{numbers}", report)
    assert len(frames) >= 36 * 4
    assert all(spilled == ["0", "0"] for _, _, *spilled in frames)
    assert not [name for name, frame, *_ in frames if frame != "0" and "measure" not in name]
    registers = dict(re.findall(r"entry function '(\S+)'(?s:.*?)Used (\d+) registers", report))
    # Steps that lie flat, without anything around the rule.
    plain = re.compile(r"4stepI.*Li\dEf.*Lb0ELb0E")
    steps = {name: int(n) for name, n in registers.items() if plain.search(name)}
    assert len(steps) >= 9
    assert max(steps.values()) <= REGISTERS_FOR_FOUR, steps


def disassembler() -> str | None:
    """Return the command that lists the instructions of a binary."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("nvidia")
    for package in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(package).glob("*/bin/nvdisasm")):
            path.chmod(0o755)
            return str(path)
    return found


def loops_with(instruction: str, lines: list[str]) -> list[list[str]]:
    """Return the smallest loops that hold an instruction.

    A loop is what lies between a label and a jump back to it.
    """
    labels, found = {}, []
    for n, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = n
        elif (jump := re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) and jump[1] in labels:
            found.append((labels[jump[1]], n))
    found = [a for a in found if any(instruction in line for line in lines[a[0] : a[1]])]
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [lines[first:last] for first, last in inner]


@pytest.mark.parametrize("architecture", ["75", "90"])
def test_main_loops(architecture: str, folder: Path) -> None:
    """They move 16 bytes at once, and compute in double for tensors of double alone."""
    command = disassembler()
    if command is None:
        pytest.skip("there is no nvdisasm (PyPI has it: nvidia-cuda-nvdisasm)")
    path, _ = cubin(architecture, folder)
    text = subprocess.run([command, "-c", path], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"^\.text\.", text, flags=re.M)[1:]
    seen: Counter[str] = Counter()
    for kernel in kernels:
        name, *lines = kernel.splitlines()
        if re.findall(r"Lb[01]E", name)[:1] == ["Lb1E"]:  # laid out: an element at a time
            continue
        wide = loops_with("STG.E.128" if "zero" in name else "LDG.E.128", lines)
        assert wide, f"no loop of {name} moves 16 bytes"
        seen[name] += 1
        if "measure" in name:  # reads alone, and computes in double
            continue
        for loop in wide:
            assert any("STG.E.128" in line for line in loop), name
            generic = [line for line in loop if re.search(r"\b(LD|ST)\.E\b", line)]
            assert not generic, (name, generic[:3])  # which first ask what memory it is
            doubles = [line for line in loop if re.search(r"\b(DADD|DMUL|DFMA|F2F\.F64)\b", line)]
            is_double = re.search(r"(ELi\d|ing)Ed", name) is not None
            assert is_double or not doubles, (name, doubles[:3])
    assert len(seen) >= 36 * 3


def test_the_host_side_compiles(tmp_path: Path) -> None:
    """What calls CUDA's and torch's libraries, against torch's headers: of any build of torch."""
    include = Path(cuda.home_of(NVCC)) / "include"
    if not (include / "cuda_runtime_api.h").exists():
        pytest.skip("there are no headers of CUDA")
    macros = ["-DFASTSGD_CUDA=1", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DFASTSGD_WIDE_KERNELS=0"]
    headers = [f"-isystem{folder}" for folder in [*cpp_extension.include_paths(), include]]
    headers += [f"-isystem{sysconfig.get_path('include')}", f"-I{ROOT / 'csrc'}"]
    for source in ("cuda_device.cpp", "devices.cpp"):
        path = ROOT / "csrc" / "cuda" / source
        command = ["c++", "-std=c++20", "-Wall", "-Wextra", "-Werror", *macros, *headers]
        done = subprocess.run(
            [*command, "-fsyntax-only", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
