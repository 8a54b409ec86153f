"""What a step takes besides time: a warm step allocates nothing, a first one only its states."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import isolated
import preload
import pytest
import torch
from cases import OPTIMIZERS, Row
from oracle import all_params
from twins import ORDINARY

from fastsgd.bench import malloc

# All that a step does beside stock's, at once.
EXTRAS: dict[str, Any] = {
    "max_grad_norm": 0.01,
    "clip_grad_value": 0.5,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "clear_grads": "zero",
}

CHILD = """
    import ctypes, gc, torch
    from cases import OPTIMIZERS, DTYPES
    from twins import parameters, random_grad

    counter = ctypes.CDLL(None)
    counter.allocations.restype = ctypes.c_long
    row = OPTIMIZERS[{index}]
    STEPS = 100

    def measure(name, shapes, dtype, options, threads, layout=lambda t: t):
        torch.set_num_threads(threads)
        made = parameters(*shapes, dtype=dtype)()
        params = [torch.nn.Parameter(layout(p.detach())) for p in made]
        for p in params:
            p.grad = random_grad(p)
        optimizer = row.ours(params, **options)
        def act():
            optimizer.step()
        for _ in range(5):
            act()
        gc.collect(); gc.disable()
        before = counter.allocations()
        for _ in range(STEPS):
            act()
        used = counter.allocations() - before
        gc.enable()
        assert used < STEPS, f"{{name}}: {{used}} allocations in {{STEPS}} warm steps"

    probe = counter.allocations()
    torch.empty(100_000)
    assert counter.allocations() > probe, "the counter does not count"
    for options in (row.plain, row.rich, {{**row.rich, **row.fused}}, {{**row.rich, **{extras}}}):
        for dtype in DTYPES:
            measure("small", [(4, 3), (3,)], dtype, options, 1)
        for dtype in (torch.float32, torch.bfloat16):
            measure("many", [(16,)] * 1000, dtype, options, 1)
            measure("parallel", [(60_000,)] * 10, dtype, options, 2)
        measure("transposed", [(33, 17)] * 5, torch.float32, options, 1, lambda t: t.t())
        measure("sliced", [(33, 17)] * 5, torch.float32, options, 1, lambda t: t[:, :9])
    print("done")
"""


def test_a_warm_step_allocates_nothing(row: Row, tmp_path: Path) -> None:
    """Neither Python nor C++ asks the system for memory: malloc itself is counted."""
    surroundings = preload.surroundings(malloc.COUNTING, tmp_path)
    code = CHILD.format(index=OPTIMIZERS.index(row), extras=EXTRAS)
    assert isolated.run(code, env=surroundings).strip() == "done"


@pytest.mark.parametrize("options", ["plain", "rich", "extras"])
def test_no_tensor_is_made_by_a_warm_step(row: Row, options: str) -> None:
    """Torch's allocator, watched by the profiler, is not called."""
    given = {**row.rich, **EXTRAS} if options == "extras" else getattr(row, options)
    optimizer = row.ours(ORDINARY(), **given)
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        optimizer.step()
    made: list[Any] = [e for e in profile.events() if e.name == "[memory]"]
    assert not [e for e in made if e.cpu_memory_usage > 0], made


def test_peak_memory_of_a_step(row: Row) -> None:
    """A step needs its states and averages, and no more (stock's foreach copies the grads)."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    said = isolated.run(
        f"""
        import ctypes, sys, torch
        from cases import OPTIMIZERS
        row = OPTIMIZERS[{OPTIMIZERS.index(row)}]

        def peak():
            for line in open("/proc/self/status"):
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1024

        MIB = 64
        params = [torch.nn.Parameter(torch.ones(MIB * 2**18 // 4)) for _ in range(4)]
        for p in params:
            p.grad = torch.ones_like(p)
        extras = {{**row.rich, **{EXTRAS}}}
        cases = [(row.plain, len(row.plain_states)), (row.rich, len(row.states))]
        for options, states in (*cases, (extras, len(row.states) + 1)):
            optimizer = None  # the last one's states are gone
            optimizer = row.ours(params, **options)
            states -= row.eager and len(row.states)
            ctypes.CDLL(None).malloc_trim(0)
            try:
                open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is resident
            except OSError:
                print("no peak")
                sys.exit()
            before = peak()
            for _ in range(3):
                optimizer.step()
            used = peak() - before
            assert used < states * MIB + 8, f"{{used}} MiB for {{states}} states of {{MIB}} MiB"
        """
    )
    if "no peak" in said:
        pytest.skip("the kernel does not measure peaks anew")
