"""Whether the CUDA kernels are compiled, by what, and for which devices.

They are where torch has CUDA and there is an nvcc that fits it; no device need be there. The
variable ``FASTSGD_CUDA`` overrides: 0 leaves them out, 1 makes it an error not to have them.
Importable only where torch is.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

import torch
from setuptools.errors import CompileError

from build_support.compilers import first_error

KERNELS = "csrc/cuda/kernels.cu"

OLDEST = 70  # __grid_constant__, and arguments of 32,764 bytes
OLDEST_RELEASE = (12, 1)  # which has such arguments

# As with the C++ compiler: a * b + c is rounded twice, and kernels say fma where torch has one.
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fmad=false",
    "--threads=0",
    "-Xcompiler=-fvisibility=hidden",
    "-Xfatbin=-compress-all",  # of a dozen megabytes makes one
]


class NoToolkit(Exception):
    """There is nothing to compile CUDA kernels with, or no reason to.

    Attributes:
        cure: What would change that.
    """

    def __init__(self, why: str, cure: str) -> None:
        """Take both as clauses of a sentence."""
        super().__init__(why)
        self.cure = cure


@dataclass
class Toolkit:
    """A CUDA toolkit that fits torch.

    Attributes:
        home: Its folder: ``bin/nvcc`` and the headers are there.
        release: Of its nvcc, ``"13.0"``.
        libraries: The folder of its runtime library.
        runtime: How a linker is told that library.
        architectures: What the kernels are compiled for, ``["sm_75", ...]``; empty where
            ``TORCH_CUDA_ARCH_LIST`` says it, which torch's own build reads.
    """

    home: str
    release: str
    libraries: str
    runtime: str
    architectures: list[str]

    @property
    def include(self) -> str:
        """The folder of its headers."""
        return os.path.join(self.home, "include")

    @property
    def flags(self) -> list[str]:
        """The flags of nvcc: for each device its own code, and for later ones the newest's."""
        numbers = [name.removeprefix("sm_") for name in self.architectures]
        flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
        flags += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in numbers[-1:]]
        return FLAGS + flags

    def __str__(self) -> str:
        """Say what ``python -m fastsgd info`` is to say."""
        named = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        return f"nvcc {self.release} for {', '.join(self.architectures) or named}"


def find_toolkit(compiler: str, folder: str) -> Toolkit:
    """Return the toolkit to compile with, tried beside the C++ compiler; ``folder`` is for that.

    Raises:
        NoToolkit: The kernels are to be left out.
        CompileError: They cannot be compiled, and ``FASTSGD_CUDA`` says that they must.
    """
    asked = os.environ.get("FASTSGD_CUDA", "").strip()
    if asked not in {"", "0", "1"}:
        raise CompileError(
            f"FASTSGD_CUDA is {asked!r}: 0 leaves the CUDA kernels out, 1 requires them, and unset "
            "they are compiled where torch and nvcc allow it."
        )
    if asked == "0":
        raise NoToolkit("FASTSGD_CUDA was 0", "unset FASTSGD_CUDA")
    try:
        toolkit = _fitting_toolkit()
        _try(toolkit, compiler, folder)
    except NoToolkit as lack:
        if asked == "1":
            raise CompileError(
                f"FASTSGD_CUDA is 1, but {lack}: {lack.cure}, or unset FASTSGD_CUDA."
            ) from None
        raise
    return toolkit


def _fitting_toolkit() -> Toolkit:
    release = torch.version.cuda
    if release is None:
        raise NoToolkit("torch was a CPU build", "install a torch with CUDA")
    major = release.partition(".")[0]
    cure = f"install the toolkit of CUDA {major} (its folder goes in CUDA_HOME)"
    nvcc = find_nvcc()
    if nvcc is None:
        raise NoToolkit("there was no nvcc", cure)
    text = _ask(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise NoToolkit(f"{nvcc} did not tell its release", cure)
    if found[1] != major:
        raise NoToolkit(f"nvcc was of CUDA {found[1]}.{found[2]} and torch of {release}", cure)
    if (int(found[1]), int(found[2])) < OLDEST_RELEASE:
        oldest = ".".join(map(str, OLDEST_RELEASE))
        raise NoToolkit(f"nvcc was of CUDA {found[1]}.{found[2]}", f"install {oldest} or newer")
    home = home_of(nvcc)
    libraries, runtime = _find_runtime(home, major)
    return Toolkit(home, f"{found[1]}.{found[2]}", libraries, runtime, _architectures(nvcc))


def find_nvcc() -> str | None:
    """Return nvcc's path: torch's choice where a variable names a toolkit, else the usual ones."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    named = [home for home in homes if home]
    if named:  # as torch does it: nothing else is looked at
        return shutil.which("nvcc", path=os.path.join(named[0], "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def home_of(nvcc: str) -> str:
    """Return the folder of the toolkit; an nvcc on the path may be a script that calls its own."""
    told = re.search(r"^#\$ TOP=(.+)$", _ask(nvcc, "--dryrun", "any.cu"), flags=re.M)
    top = told[1].strip() if told else os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))
    return os.path.normpath(top)


def _find_runtime(home: str, major: str) -> tuple[str, str]:
    """Return the folder of the runtime library, and its name for a linker."""
    for folder in ("lib64", "lib", "targets/*/lib"):
        for path in sorted(glob.glob(os.path.join(home, folder, "libcudart.so"))):
            return os.path.dirname(path), "cudart"
    # A torch from PyPI brings the library in a package beside its own, under its full name alone.
    beside = os.path.join(os.path.dirname(torch.__path__[0]), "nvidia", "*", "lib")
    for path in sorted(glob.glob(os.path.join(beside, f"libcudart.so.{major}"))):
        return os.path.dirname(path), f":libcudart.so.{major}"
    raise NoToolkit(
        f"{home} has no libcudart.so", f"install the runtime library of CUDA {major} there"
    )


def _architectures(nvcc: str) -> list[str]:
    """Return those of torch that nvcc knows and that have what the kernels use."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named == "native" and torch.cuda.device_count() == 0:
        raise NoToolkit(
            "TORCH_CUDA_ARCH_LIST was native and no device was there",
            "name architectures in TORCH_CUDA_ARCH_LIST, or unset it",
        )
    for number in re.findall(r"\d+\.\d+", named):
        if float(number) * 10 < OLDEST:
            raise NoToolkit(
                f"TORCH_CUDA_ARCH_LIST names {number} and the kernels need {OLDEST / 10} or newer",
                f"leave {number} out of it",
            )
    if named:
        return []
    known = set(_ask(nvcc, "--list-gpu-code").split())
    flags = torch._C._cuda_getArchFlags() or ""  # torch.cuda hides them where no device is
    return [name for name in flags.split() if name in known and _number(name) >= OLDEST]


def _number(architecture: str) -> int:
    """Return 90 of ``sm_90a``."""
    return int("".join(filter(str.isdigit, architecture)))


def _try(toolkit: Toolkit, compiler: str, folder: str) -> None:
    """Compile a line, to say in one sentence what a page of errors would say."""
    source = os.path.join(folder, "try.cu")
    with open(source, "w") as file:
        file.write("#include <cuda_runtime_api.h>\n#include <concepts>\n__global__ void k() {}\n")
    nvcc = os.path.join(toolkit.home, "bin", "nvcc")
    command = [nvcc, "-std=c++20", *host_compiler(compiler), "-c", source, "-o", f"{source}.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        why = first_error(result.stderr + result.stdout) or "it failed"
        raise NoToolkit(
            f"nvcc {toolkit.release} could not compile beside {compiler} ({why})",
            "name a compiler that it takes in CXX",
        )


def host_compiler(compiler: str) -> list[str]:
    """Return the flags that make nvcc use a C++ compiler; a command of several words it has not."""
    words = shlex.split(compiler)
    return [f"-ccbin={shutil.which(words[0]) or words[0]}"] if len(words) == 1 else []


def _ask(nvcc: str, *question: str) -> str:
    done = subprocess.run([nvcc, *question], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
