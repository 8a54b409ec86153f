"""What was built, what was found, and what was chosen: `python -m fastsgd info`."""

import argparse
import os
from collections.abc import Sequence

import torch

import fastsgd
from fastsgd import _C, _build_info


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a fact; what a bug report should begin with.

    Args:
        argv: Options (there are none but `-h`); `sys.argv[1:]` by default.

    Returns:
        The exit code, 0.
    """
    argparse.ArgumentParser(
        prog="python -m fastsgd info", description="Print what was built, found and chosen."
    ).parse_args(argv)
    for name, value in facts().items():
        print(f"{name:<17} {value}")
    return 0


def facts() -> dict[str, str]:
    """The lines of `info`: names and values, in the order in which they are printed."""
    return {
        "fastsgd": fastsgd.__version__,
        "torch found": f"{torch.__version__} ({cuda_release(torch.version.cuda)})",
        "compiled against": f"{_build_info.TORCH_VERSION} ({cuda_release(_build_info.TORCH_CUDA)})",
        "compiler": _build_info.COMPILER,
        "instruction set": f"{_C.instruction_set()} ({capability()})",
        "threads": f"{_C.threads()} (torch.get_num_threads() is {torch.get_num_threads()})",
        "CUDA": cuda(),
    }


def cuda_release(release: str | None) -> str:
    """A torch's CUDA release in words; None is a CPU build."""
    return "CPU build" if release is None else f"CUDA {release}"


def capability() -> str:
    """What torch dispatches to on this CPU, and whether ATEN_CPU_CAPABILITY had a say in it."""
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    setting = "is not set" if asked is None else f"is {asked!r}"
    return f"torch uses {torch.backends.cpu.get_cpu_capability()}, ATEN_CPU_CAPABILITY {setting}"


def cuda() -> str:
    """`yes` and the devices, or `no` and the reason."""
    kernels = _build_info.CUDA_KERNELS
    if fastsgd.cuda_available():
        devices = range(torch.cuda.device_count())
        names = ", ".join(torch.cuda.get_device_name(device) for device in devices)
        return f"yes: {names} (kernels by {kernels})"
    if kernels is not None:
        return f"no: torch finds no CUDA device (kernels by {kernels})"
    return (
        f"no: when this was built, {_build_info.NO_CUDA_KERNELS}; CUDA parameters take torch's own "
        "path"
    )
