"""The instruction sets of this machine, by the names that ``ATEN_CPU_CAPABILITY`` takes."""

from __future__ import annotations

import torch

# From narrow to wide: torch's name, and that of fastsgd's kernels.
KERNELS = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}


def supported() -> dict[str, str]:
    """Return those that this machine can run."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    widest = list(KERNELS).index(best) if best in KERNELS else 0
    return dict(list(KERNELS.items())[: widest + 1])
