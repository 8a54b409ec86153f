"""What the build makes of the compilers that it finds."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import isolated
import pytest
import torch
from setuptools.errors import CompileError
from source_tree import require_source

from fastsgd import _C, _build_info, _stock

require_source()

from build_support import cuda, variants  # noqa: E402

# An nvcc that answers as one does, and compiles nothing.
NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
    --dryrun) echo "#$ TOP={home}/bin/.." >&2 ;;
    --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n' ;;
    *) {compile} ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit that fits a torch with CUDA 13.0; what is in its place is a script."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_75 sm_90 sm_120", raising=False)
    for name in ("FASTSGD_CUDA", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "toolkit"
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libcudart.so").touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    write_nvcc(home, home)
    return home


def write_nvcc(folder: Path, home: Path, release: str = "13.0", compile: str = "exit 0") -> None:
    """Write the script into ``folder/bin``."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NVCC.format(release=release, home=home, compile=compile))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def lack(folder: Path) -> cuda.NoToolkit:
    with pytest.raises(cuda.NoToolkit) as caught:
        cuda.find_toolkit("c++", str(folder))
    return caught.value


def test_a_toolkit_that_fits(home: Path, tmp_path: Path) -> None:
    """For the devices of torch that nvcc knows, and in a form that later ones can compile."""
    toolkit = cuda.find_toolkit("c++", str(tmp_path))
    assert toolkit.home == str(home) and toolkit.libraries == str(home / "lib64")
    assert toolkit.architectures == ["sm_75", "sm_90"]
    codes = [flag.split("=", 1)[1] for flag in toolkit.flags if flag.startswith("-gencode")]
    assert codes == [
        "arch=compute_75,code=sm_75",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]
    assert str(toolkit) == "nvcc 13.0 for sm_75, sm_90"
    assert "-fmad=false" in toolkit.flags


def test_architectures_that_are_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are torch's to read."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    toolkit = cuda.find_toolkit("c++", str(tmp_path))
    assert not [flag for flag in toolkit.flags if "arch" in flag]
    assert str(toolkit) == "nvcc 13.0 for 8.0 9.0+PTX"


def test_architectures_that_are_too_old(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's are left out; one that is named is said to be."""
    write_nvcc(home, home)
    known = home / "bin" / "nvcc"
    known.write_text(known.read_text().replace("'sm_75", "'sm_60\\nsm_75"))
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_60 sm_75 sm_90")
    assert cuda.find_toolkit("c++", str(tmp_path)).architectures == ["sm_75", "sm_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.1;9.0+PTX")
    why = lack(tmp_path)
    assert str(why) == "TORCH_CUDA_ARCH_LIST names 6.1 and the kernels need 7.0 or newer"
    assert why.cure == "leave 6.1 out of it"


def test_a_script_on_the_path_that_calls_nvcc(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toolkit is where nvcc says that it is, not above the script."""
    monkeypatch.delenv("CUDA_HOME")
    write_nvcc(tmp_path / "elsewhere", home)
    folder = tmp_path / "elsewhere" / "bin"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert cuda.find_toolkit("c++", str(tmp_path)).home == str(home)


def test_the_runtime_library_that_torch_brings(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home / "lib64")
    monkeypatch.setattr(torch, "__path__", [str(tmp_path / "site" / "torch")])
    assert "has no libcudart.so" in str(lack(tmp_path))
    folder = tmp_path / "site" / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.13").touch()
    toolkit = cuda.find_toolkit("c++", str(tmp_path))
    assert (toolkit.libraries, toolkit.runtime) == (str(folder), ":libcudart.so.13")


def no_cuda_in_torch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)


def no_nvcc(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bin" / "nvcc").unlink()


def another_release(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(home, home, release="12.8")


def too_old(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    write_nvcc(home, home, release="12.0")


def no_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(home, home, release="unknown")


def an_old_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(home, home, compile="echo '#error -- unsupported GNU version!'; exit 1")


def no_device(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


LACKS = [
    (no_cuda_in_torch, "torch was a CPU build", "install a torch with CUDA"),
    (no_nvcc, "there was no nvcc", "install the toolkit of CUDA 13"),
    (another_release, "nvcc was of CUDA 12.8 and torch of 13.0", "install the toolkit of CUDA 13"),
    (too_old, "nvcc was of CUDA 12.0", "install 12.1 or newer"),
    (no_answer, "did not tell its release", "install the toolkit of CUDA 13"),
    (an_old_compiler, "(#error -- unsupported GNU version!)", "in CXX"),
    (no_device, "TORCH_CUDA_ARCH_LIST was native", "unset it"),
]


@pytest.mark.parametrize("spoil, why, cure", LACKS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_may_be_lacking(
    spoil, why: str, cure: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels are left out; or, where they are required, one sentence says why they cannot."""
    spoil(home, monkeypatch)
    found = lack(tmp_path)
    assert why in str(found) and cure in found.cure
    monkeypatch.setenv("FASTSGD_CUDA", "1")
    with pytest.raises(CompileError) as caught:
        cuda.find_toolkit("c++", str(tmp_path))
    message = str(caught.value)
    assert message.startswith("FASTSGD_CUDA is 1, but ") and "\n" not in message
    assert why in message and cure in message


def test_kernels_that_are_not_wanted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSGD_CUDA", "0")
    assert str(lack(tmp_path)) == "FASTSGD_CUDA was 0"
    monkeypatch.setenv("FASTSGD_CUDA", "yes")
    with pytest.raises(CompileError, match="FASTSGD_CUDA is 'yes': 0 leaves the CUDA kernels out"):
        cuda.find_toolkit("c++", str(tmp_path))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_nvcc_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles a line beside the C++ compiler, for a torch that it would fit."""
    for name in ("FASTSGD_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    nvcc = shutil.which("nvcc")
    release = cuda._ask(nvcc, "--version").split("release ")[1].split(",")[0]
    monkeypatch.setattr(torch.version, "cuda", release)
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_90 sm_9999", raising=False)
    try:
        toolkit = cuda.find_toolkit("c++", str(tmp_path))
    except cuda.NoToolkit as why:
        if "libcudart" in str(why):
            pytest.skip(f"{why}")
        raise
    assert toolkit.release == release and toolkit.architectures == ["sm_90"]
    assert (Path(toolkit.include) / "cuda_runtime_api.h").exists()


def test_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build has the flags of the variant that is named; there are no others."""
    monkeypatch.setenv("FASTSGD_BUILD", "sanitize")
    assert variants.linker_flags() == ["-fsanitize=address,undefined"]
    monkeypatch.delenv("FASTSGD_BUILD")
    assert variants.flags() == []
    monkeypatch.setenv("FASTSGD_BUILD", "fast")
    with pytest.raises(CompileError, match="FASTSGD_BUILD is 'fast': it is one of strict, sani"):
        variants.variant()


# What a user hears of it, at the first step of parameters on a device.


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Step parameters on a device that is not there; return what is said."""
    monkeypatch.setattr(_stock, "_warned_of", set())
    monkeypatch.setattr(_C, "has_kernels_for", lambda device: device.type == "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")

    def step(*devices: str) -> list[str]:
        found = [torch.device(device) for device in devices]
        monkeypatch.setattr(_C, "devices_of", lambda params: found)
        with pytest.warns() as said:
            _stock.warn_of_devices([])
            _stock.warn_of_devices([])
        texts = [str(warning.message) for warning in said]
        return [text for text in texts if text.startswith("fastsgd")]  # setuptools warns too

    return step


def test_a_build_without_cuda_kernels(on, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build_info, "CUDA_KERNELS", None)
    monkeypatch.setattr(_build_info, "NO_CUDA_KERNELS", "there was no nvcc")
    monkeypatch.setattr(_build_info, "CUDA_CURE", "install the toolkit of CUDA 13")
    (text,) = on("cpu", "cuda:0", "cuda:1", "meta")
    assert "no CUDA kernels, as there was no nvcc when it was built" in text
    assert "install the toolkit of CUDA 13, then rebuild fastsgd with `" in text


def test_a_build_for_other_devices(on, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build_info, "CUDA_KERNELS", "nvcc 13.0 for sm_90")
    (text,) = on("cpu", "cuda:0")
    assert "compiled by nvcc 13.0 for sm_90, not for cuda:0 (A GPU, sm_70)" in text
    assert "set TORCH_CUDA_ARCH_LIST=7.0 and rebuild fastsgd with `" in text


def test_a_device_of_another_kind(on) -> None:
    (text,) = on("xpu:0")
    assert text.startswith("fastsgd has kernels for the CPU and for CUDA: parameters on xpu are")


def test_what_a_test_starts_is_of_the_same_build() -> None:
    """Also of a build beside the installed one."""
    found = isolated.run("from fastsgd import _C; print(_C.__file__)")
    assert found.strip() == _C.__file__
