"""Many steps, with all that a loop does around them: memory and time stay as they are."""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import isolated
import pytest
import torch
from cases import OPTIMIZERS, Row
from torch import nn

EXTRAS: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": lambda number: min(0.99, (1 + number) / (10 + number)),
    "clear_grads": True,
}
BLOCK = 250  # steps between two looks


class Loop:
    """A small model that is trained, with everything that steps meet in a loop, now and then."""

    def __init__(self, row: Row, **extras: Any) -> None:
        """Make all of it."""
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer: Any = row.ours(self.model.parameters(), **row.rich, **row.fused, **extras)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=50)
        self.inputs = torch.randn(4, 7)
        self.steps = 0

    def step(self) -> None:
        """Take one step, and what else is due."""
        self.steps += 1
        loss = self.model(self.inputs).square().mean()
        if self.steps % 40 == 0:
            loss = loss * float("inf")
        if self.steps % 10 < 5:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            if self.steps % 40 or self.optimizer.skip_nonfinite:
                self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=self.steps % 2 == 0)
        if self.steps % 50 == 0:
            self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
            if self.optimizer.ema_decay is not None:
                with self.optimizer.ema_weights():
                    self.model(self.inputs)


def blocks(loop: Loop, count: int) -> list[float]:
    """Take so many blocks of steps; return how long each took."""
    took = []
    for _ in range(count):
        begin = time.perf_counter()
        for _ in range(BLOCK):
            loop.step()
        took.append(time.perf_counter() - begin)
    return took


class Mallinfo(ctypes.Structure):
    """What glibc says of its heaps."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def heap() -> int | None:
    """Return the bytes that malloc has given and not got back; None where that is not told."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = Mallinfo
    told = mallinfo()
    return int(told.uordblks + told.hblkhd)


def resident() -> int | None:
    """Return the bytes of this process that are in memory; None where that is not told."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return 1024 * int(line.split()[1])


def objects() -> tuple[int, int]:
    """Return how many blocks of memory Python's objects have, and how many tensors there are."""
    gc.collect()
    tensors = sum(type(known) in (torch.Tensor, nn.Parameter) for known in gc.get_objects())
    return sys.getallocatedblocks(), tensors


def assert_flat(index: int, count: int, *, in_time: bool = False) -> None:
    """So many blocks take no more memory than a few, nor, where that is asked, more time."""
    torch.set_num_threads(1)
    for extras in ({}, EXTRAS):
        loop = Loop(OPTIMIZERS[index], **extras)
        blocks(loop, 2)
        counted, used, held = objects(), heap(), resident()
        took = blocks(loop, count)
        more = [now - before for now, before in zip(objects(), counted, strict=True)]
        steps = count * BLOCK
        assert more[0] < steps / 4 and more[1] == 0, f"blocks, tensors more than before: {more}"
        if used is not None:
            grown = heap() - used
            assert grown < 4 * steps + 2**14, f"{grown} bytes of heap in {steps} steps"
        if held is not None:
            grown = resident() - held
            assert grown < 2**22, f"{grown} bytes resident in {steps} steps"
        if in_time:
            early, late = (statistics.median(part) for part in (took[:20], took[-20:]))
            assert late < 1.5 * early, f"a block took {early:.4f} s and takes {late:.4f} s"


def soak(row: Row, count: int, timeout: float, *, in_time: bool = False) -> None:
    isolated.run(
        f"""
        import test_soak
        test_soak.assert_flat({OPTIMIZERS.index(row)}, {count}, in_time={in_time})
        """,
        timeout=timeout,
    )


def test_soak(row: Row) -> None:
    """A thousand steps, with extras and without."""
    soak(row, 4, 120)


@pytest.mark.slow
def test_long_soak(row: Row) -> None:
    """A hundred thousand; here alone time is looked at."""
    soak(row, 100_000 // BLOCK, 3600, in_time=True)
