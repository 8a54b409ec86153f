"""How ``fastsgd._C`` is compiled: the engine once, the kernels once for each instruction set.

Where torch has CUDA and there is an nvcc, the CUDA kernels are compiled too, into the same module.

Importable only where torch is.
"""

import logging
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

from build_support import cuda, variants
from build_support.compilers import first_error

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
        extra_compile_args=[*FLAGS, *variants.flags(), *torch_headers],
        extra_link_args=variants.linker_flags(),
    )
    ext.include_dirs = [os.path.abspath("csrc")]
    return ext


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with the kernels compiled once for each instruction set, and ``_build_info.py``.

    Compiler flags belong to an extension and not to a file, hence the class. ninja recompiles what
    a changed header, flag or compiler touches; without ninja everything is compiled every time.
    """

    def finalize_options(self) -> None:
        """Keep objects between builds, those of another torch or variant apart."""
        super().finalize_options()
        self.force = True
        parts = [sysconfig.get_config_var("SOABI"), "torch", torch.__version__, variants.variant()]
        folder = "-".join(filter(None, parts))
        base = self.get_finalized_command("build").build_base
        self.build_temp = os.path.join(base, "objects", folder)

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
        self.toolkit, lack = None, None
        try:
            self.toolkit = cuda.find_toolkit(compiler, self.build_temp)
            self.announce(f"with CUDA kernels: {self.toolkit}", level=logging.INFO)
        except cuda.NoToolkit as why:
            lack = why
            self.announce(f"without CUDA kernels: {why}", level=logging.INFO)
        super().run()
        for folder in [self.build_lib] + ["."] * bool(self.inplace):
            path = os.path.join(folder, "fastsgd", "_build_info.py")
            write_build_info(path, self.compiler_version, self.toolkit, lack)

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels' copies, and the CUDA kernels, which are linked into ``ext``."""
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                [KERNELS],
                output_dir=os.path.join(self.build_temp, name),
                macros=[*MACROS, ("FASTSGD_ISA", name)],
                include_dirs=[os.path.abspath("csrc")],
                extra_postargs=[*FLAGS, *variants.flags(), *flags],
            )
        if self.toolkit is not None:
            self.add_cuda(ext, self.toolkit)
        super().build_extension(ext)

    def add_cuda(self, ext: Extension, toolkit: cuda.Toolkit) -> None:
        """Compile the CUDA kernels, and have ``ext`` call them and CUDA's libraries."""
        cpp_extension.CUDA_HOME = toolkit.home  # torch guesses from where an nvcc is
        compiler = cuda.host_compiler(os.environ["CXX"])
        ext.extra_objects += self.compiler.compile(
            [cuda.KERNELS],
            output_dir=os.path.join(self.build_temp, "cuda"),
            include_dirs=[os.path.abspath("csrc")],
            extra_postargs={"cxx": [], "nvcc": [*toolkit.flags, *compiler]},
        )
        ext.define_macros.append(("FASTSGD_CUDA", "1"))
        ext.extra_compile_args.append(f"-isystem{toolkit.include}")
        ext.library_dirs.append(toolkit.libraries)
        ext.libraries += [toolkit.runtime, "c10_cuda", "torch_cuda"]


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
    why = first_error(result.stderr) or result.stderr.strip() or "it fails"
    cure = "use a newer GCC or Clang"
    if "Python.h" in why:
        cure = "install Python's headers (on Debian or Ubuntu: apt install python3-dev)"
    raise CompileError(f"{compiler} cannot compile fastsgd ({why}): {cure}.")


def ask_version(compiler: str) -> str:
    """Return the first line of what the compiler says about itself."""
    command = [*shlex.split(compiler), "--version"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0] if lines else compiler


def write_build_info(
    path: str, compiler: str, toolkit: cuda.Toolkit | None, lack: cuda.NoToolkit | None
) -> None:
    """Write the module that is compared with the torch found at import, before ``_C`` loads."""
    facts = {
        "TORCH_VERSION": quote(torch.__version__.partition("+")[0]),
        "TORCH_CUDA: str | None": quote(torch.version.cuda),
        "COMPILER": quote(compiler),
        "CUDA_KERNELS: str | None": quote(str(toolkit) if toolkit else None),
        "NO_CUDA_KERNELS: str | None": quote(str(lack) if lack else None),
        "CUDA_CURE: str | None": quote(lack.cure if lack else None),
    }
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write('"""What fastsgd._C was compiled with (written by the build)."""\n\n')
        for name, fact in facts.items():
            file.write(f"{name} = {fact}\n")


def quote(text: str | None) -> str:
    """Return ``text`` as a literal, in double quotes unless it is None."""
    if text is None:
        return "None"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
