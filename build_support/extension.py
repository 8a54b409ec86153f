"""How ``fastsgd._C`` is compiled: the engine once, the kernels once for each instruction set.

Importable only where torch is.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from glob import glob

import torch
from setuptools import Extension
from setuptools.errors import CompileError, PlatformError
from torch.utils import cpp_extension

KERNELS = "csrc/cpu/kernels.cpp"

# Contracting a * b + c would round otherwise than torch does; kernels say fma where torch has one.
# Python's own flags often hold -g, which makes the library twenty times as large.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fno-plt",
    "-Wall",
    "-Wextra",
]

WIDE_KERNELS = sysconfig.get_platform() == "linux-x86_64"
INSTRUCTION_SETS = {"baseline": []}
if WIDE_KERNELS:
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            "-mavx512f",
            "-mavx512bw",
            "-mavx512dq",
            "-mavx512vl",
            "-mfma",
            "-mf16c",
        ],
    }
MACROS = [("FASTSGD_WIDE_KERNELS", str(int(WIDE_KERNELS)))]


def extension() -> Extension:
    """Return ``fastsgd._C`` but for the kernels, which ``BuildExtension`` adds."""
    # Warnings are about our headers: torch's are system headers.
    torch_headers = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    ext = cpp_extension.CppExtension(
        "fastsgd._C",
        sorted({*glob("csrc/**/*.cpp", recursive=True)} - {KERNELS}),
        define_macros=list(MACROS),
        extra_compile_args=[*FLAGS, *torch_headers],
    )
    ext.include_dirs = [os.path.abspath("csrc")]
    return ext


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with the kernels compiled once for each instruction set, and ``_build_info.py``.

    Compiler flags belong to an extension and not to a file, hence the class. ninja recompiles what
    a changed header, flag or compiler touches; without ninja everything is compiled every time.
    """

    def finalize_options(self) -> None:
        """Keep objects between builds, those of one torch apart from those of another."""
        super().finalize_options()
        self.force = True
        folder = f"{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}"
        self.build_temp = os.path.join("build", "objects", folder)

    def run(self) -> None:
        """Compile, then write beside the extension what it was compiled with."""
        platform = sysconfig.get_platform()
        if not platform.startswith("linux-"):
            raise PlatformError(f"fastsgd builds on Linux with GCC or Clang, not on {platform}.")
        compiler = find_compiler()
        os.environ["CXX"] = compiler  # ninja and setuptools would each choose their own
        os.makedirs(self.build_temp, exist_ok=True)
        try_compiler(compiler, self.build_temp)
        self.compiler_version = ask_version(compiler)
        super().run()
        for folder in [self.build_lib] + ["."] * bool(self.inplace):
            path = os.path.join(folder, "fastsgd", "_build_info.py")
            write_build_info(path, self.compiler_version)

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels' copies, which are linked into ``ext``."""
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                [KERNELS],
                output_dir=os.path.join(self.build_temp, name),
                macros=[*MACROS, ("FASTSGD_ISA", name)],
                include_dirs=[os.path.abspath("csrc")],
                extra_postargs=[*FLAGS, *flags],
            )
        # For the compiler and not for the linker: torch's own runtime serves, not a second one.
        # That is GCC's, and regions compiled by Clang call LLVM's: they stay on one thread.
        if "clang" not in self.compiler_version:
            ext.extra_compile_args.append("-fopenmp")
        super().build_extension(ext)


def find_compiler() -> str:
    """Return the C++ compiler's command: ``CXX``, else the first of the usual names there is."""
    named = os.environ.get("CXX", "").strip()
    for command in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise CompileError(
        f"fastsgd needs a C++20 compiler, and there is no {named or 'c++, g++ or clang++'}: "
        "install GCC or Clang (on Debian or Ubuntu: apt install g++), or name yours in CXX."
    )


def try_compiler(compiler: str, folder: str) -> None:
    """Compile a few lines, to say in one sentence what a page of errors would say."""
    source = os.path.join(folder, "try.cpp")
    with open(source, "w") as file:
        file.write("#include <Python.h>\n#include <concepts>\n")
    headers = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    command = [*shlex.split(compiler), *FLAGS, *headers, "-fsyntax-only", source]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return
    why = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr)
    cure = "use a newer GCC or Clang"
    if "Python.h" in why:
        cure = "install Python's headers (on Debian or Ubuntu: apt install python3-dev)"
    raise CompileError(f"{compiler} cannot compile fastsgd ({why.strip() or 'it fails'}): {cure}.")


def ask_version(compiler: str) -> str:
    """Return the first line of what the compiler says about itself."""
    command = [*shlex.split(compiler), "--version"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0] if lines else compiler


def write_build_info(path: str, compiler: str) -> None:
    """Write the module that is compared with the torch found at import, before ``_C`` loads."""
    cuda = torch.version.cuda
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(
            '"""What fastsgd._C was compiled with (written by the build)."""\n\n'
            f"TORCH_VERSION = {quote(torch.__version__.partition('+')[0])}\n"
            f"TORCH_CUDA = {quote(cuda) if cuda else None}\n"
            f"COMPILER = {quote(compiler)}\n"
            "CUDA_SOURCES = False\n"
        )


def quote(text: str) -> str:
    """Return ``text`` as a literal in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
