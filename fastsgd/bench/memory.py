"""What steps take from memory: what they hold, their peak, and how often they ask for any.

Measured in a process of its own, under a `malloc` that counts, and without a pool of Python's own
before it: every object, tensor and vector that is made is seen.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from fastsgd.bench import malloc
from fastsgd.bench.contestants import Inputs, Training
from fastsgd.bench.one_pass import CHAINS, Loop, Ours, Stock
from fastsgd.bench.rules import RULES
from fastsgd.bench.shapes import SHAPES

# Counted and watched over this many steps, each after a backward of its own.
STEPS = 3
MEMORY_RULES = ("momentum", "adamw")
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Memory:
    """What one optimizer's steps take.

    Attributes:
        shape: The shape's name.
        what: The rule, and what is done around its steps.
        mode: `fastsgd`, or one of stock's.
        gradient_bytes: The size of all gradients, for comparison.
        state_bytes: The size of all states, averages included.
        held_bytes: By how much resident memory has grown from before the first step to when the
            steps are warm. None where the kernel does not tell.
        peak_bytes: By how much a warm step's peak of resident memory passes what was resident
            before it; the most of all steps. None where the kernel does not tell.
        allocations: Calls of `malloc` and its kin a warm step. None without a C compiler.
    """

    shape: str
    what: str
    mode: str
    gradient_bytes: int
    state_bytes: int
    held_bytes: int | None
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
    found = [memory for name in shapes for memory in memories(Inputs.random(SHAPES[name]))]
    print(json.dumps([asdict(memory) for memory in found]))


def memories(inputs: Inputs) -> Iterator[Memory]:
    """Measure steps alone, and what one pass does against stock's chain."""
    for rule in map(RULES.__getitem__, MEMORY_RULES):
        for mode in (rule.ours, *rule.rivals):
            training = Training(inputs, mode, rule)
            named = (inputs.shape.name, rule.title, mode.name)
            yield of(named, training, training.optimizer.step)
    around = replace(CHAINS[0], shape=inputs.shape.name)
    rule = RULES[around.rule]
    lr = rule.timed["lr"]
    for mode in (rule.ours, *rule.rivals):
        ours = mode is rule.ours
        loop = Ours(around, rule, inputs, lr) if ours else Stock(around, rule, mode, inputs, lr)
        yield of((around.shape, around.title, mode.name), loop, loop, loop.averages)


def of(
    named: tuple[str, str, str],
    training: Training | Loop,
    step: Callable[[], object],
    averages: Callable[[], list[Tensor]] = list,
) -> Memory:
    """Measure steps over gradients that a backward has made.

    Args:
        named: The shape, what is done, and who does it.
        training: Whose backward it is; no step has been taken.
        step: What is measured.
        averages: What is kept beside the optimizer's states, or among them.
    """
    gc.collect()  # what was measured before is gone
    training.backward()
    before = resident("VmRSS")
    for _ in range(WARM_UP_STEPS):
        step()
        training.backward()
    after = resident("VmRSS")
    held = None if before is None or after is None else after - before
    peaks, counts = [], []
    for _ in range(STEPS):
        counts.append(allocations_of(step))
        training.backward()
        peaks.append(peak_of(step))
        training.backward()
    known_peaks = [peak for peak in peaks if peak is not None]
    known_counts = [count for count in counts if count is not None]
    states = chain.from_iterable(state.values() for state in training.optimizer.state.values())
    kept = {id(x): x.nbytes for x in (*states, *averages()) if isinstance(x, Tensor)}
    return Memory(
        *named,
        gradient_bytes=sum(p.nbytes for p in training.parameters),
        state_bytes=sum(kept.values()),
        held_bytes=held,
        peak_bytes=max(known_peaks, default=None),
        allocations=sum(known_counts) / STEPS if known_counts else None,
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
        trim()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    except OSError:
        return None
    before = resident("VmHWM")
    call()
    after = resident("VmHWM")
    return None if before is None or after is None else after - before


def resident(name: str) -> int | None:
    """Resident memory in bytes: now by the kernel's name `VmRSS`, at its peak by `VmHWM`."""
    if name == "VmRSS":
        trim()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0].split()[1]) if found else None


def trim() -> None:
    """Give back what free() kept, or else taking it again would not show."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
