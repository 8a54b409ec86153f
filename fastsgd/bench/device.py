"""What is asked of a CUDA device, counted."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.profiler import ProfilerActivity, profile

# By how the names of CUDA's functions start.
ASKED = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "copies": ("cudaMemcpy", "cudaMemset"),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"),
}
# What waits besides, by its whole name: copies that others go on after start alike.
WAITING_COPY = "cudaMemcpy"


def asked_of_device(act: Callable[[], object]) -> dict[str, int]:
    """Count kernels launched, copies and waits, by what the profiler saw the host call.

    A copy that the host waits for is a wait too.
    """
    own = _waits_of_profiler()
    asked = counted(_calls(act))
    return asked | {"waits": max(0, asked["waits"] - own)}


def counted(names: Sequence[str]) -> dict[str, int]:
    """Count what functions of these names ask for."""
    asked = {what: sum(name.startswith(starts) for name in names) for what, starts in ASKED.items()}
    return asked | {"waits": asked["waits"] + names.count(WAITING_COPY)}


@cache
def _waits_of_profiler() -> int:
    """How often the profiler itself waits, at most; its first run sets itself up besides."""
    _calls(lambda: None)
    return max(counted(_calls(lambda: None))["waits"] for _ in range(3))


def _calls(act: Callable[[], object]) -> list[str]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        act()
    return [event.name for event in seen.events()]
