"""What a step takes from memory: its peak, and how often it asks for any once warm.

Measured in a process of its own, under a `malloc` that counts, and without a pool of Python's own
before it: every object, tensor and vector that is made is seen.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastsgd.bench import malloc
from fastsgd.bench.contestants import Inputs, Training
from fastsgd.bench.rules import RULES, Mode, Rule
from fastsgd.bench.shapes import SHAPES, Shape

# Counted and watched over this many steps, each after a backward of its own.
STEPS = 3
MEMORY_RULES = ("momentum", "adamw")
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Memory:
    """What one optimizer's steps take.

    Attributes:
        shape: The shape's name.
        what: The rule.
        mode: `fastsgd`, or one of stock's.
        gradient_bytes: The size of all gradients, for comparison.
        peak_bytes: By how much a warm step's peak of resident memory passes what was resident
            before it; the most of all steps. None where the kernel does not tell.
        allocations: Calls of `malloc` and its kin a warm step. None without a C compiler.
    """

    shape: str
    what: str
    mode: str
    gradient_bytes: int
    peak_bytes: int | None
    allocations: float | None


def memory(threads: int, shapes: Sequence[str] = ("1000x16", "mobilenet-v3")) -> list[Memory]:
    """Measure ours and stock's modes in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        preload = malloc.library(malloc.COUNTING, Path(folder))
        environment = dict(os.environ, PYTHONMALLOC="malloc")
        if preload is not None:
            environment["LD_PRELOAD"] = f"{preload}:{environment.get('LD_PRELOAD', '')}"
        code = f"from fastsgd.bench import memory; memory.child({threads}, {tuple(shapes)})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True
        )
    return [Memory(**found) for found in json.loads(done.stdout)]


def child(threads: int, shapes: Sequence[str]) -> None:
    """Measure in this process, and print JSON."""
    torch.set_num_threads(threads)
    found = [
        of(SHAPES[name], mode, rule)
        for name in shapes
        for rule in map(RULES.__getitem__, MEMORY_RULES)
        for mode in (rule.ours, *rule.rivals)
    ]
    print(json.dumps([asdict(memory) for memory in found]))


def of(shape: Shape, mode: Mode, rule: Rule) -> Memory:
    """Measure warm steps over real gradients."""
    training = Training(Inputs.random(shape), mode, rule)
    step, backward = training.optimizer.step, training.backward
    for _ in range(WARM_UP_STEPS):
        backward()
        step()
    peaks, counts = [], []
    for _ in range(STEPS):
        backward()
        counts.append(allocations_of(step))
        backward()
        peaks.append(peak_of(step))
    known_peaks = [peak for peak in peaks if peak is not None]
    known_counts = [count for count in counts if count is not None]
    return Memory(
        shape.name,
        rule.title,
        mode.name,
        sum(p.nbytes for p in training.parameters),
        max(known_peaks, default=None),
        sum(known_counts) / STEPS if known_counts else None,
    )


def allocations_of(call: Callable[[], object]) -> int | None:
    """How often a call asks for memory, less what an empty call seems to."""
    try:
        allocations = ctypes.CDLL(None).allocations
    except AttributeError:
        return None
    allocations.restype = ctypes.c_long

    def count(counted: Callable[[], object]) -> int:
        before = allocations()
        counted()
        return int(allocations() - before)

    nothing = min(count(lambda: None) for _ in range(3))
    return count(call) - nothing


def peak_of(call: Callable[[], object]) -> int | None:
    """By how much resident memory, at its peak within a call, passes what it was before."""
    try:
        # What free() kept is given back, or else taking it again would not show.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = resident()
        call()
        return resident() - before
    except (OSError, AttributeError):
        return None


def resident() -> int:
    """The peak of resident memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("the kernel does not tell the peak of resident memory")
