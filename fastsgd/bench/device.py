"""What is asked of a CUDA device, counted."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# By how the names of CUDA's functions start. The profiler itself ends in a wait for the device,
# by yet another function.
ASKED = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "copies": ("cudaMemcpy", "cudaMemset"),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}


def asked_of_device(act: Callable[[], object]) -> dict[str, int]:
    """Count kernels launched, copies and waits, by what the profiler saw the host call."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        act()
    names = [event.name for event in seen.events()]
    return {what: sum(name.startswith(starts) for name in names) for what, starts in ASKED.items()}
