"""How fast memory can be read and written here: what a large step is measured by."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import memmove
from functools import partial

import torch
from torch import Tensor

from fastsgd.bench.contest import Row, Settings
from fastsgd.bench.measure import Runner


def race_copies(row: Row, ours: Runner, settings: Settings) -> None:
    """Race ours with copies within `row.copy_bytes`."""
    for name, copy in copies(row.copy_bytes, settings):
        row.copies[name] = settings.race(ours, copy, row.copies.values())


def race_passes(row: Row, ours: Runner, settings: Settings) -> None:
    """Race ours with passes in place over as much."""
    for name, once in passes(row.copy_bytes, settings):
        row.passes[name] = settings.race(ours, once, row.passes.values())


def copies(bytes_touched: int, settings: Settings) -> Iterator[tuple[str, Runner]]:
    """Copies within so much memory, half of it read and half of it written.

    torch's reads each line of the target before it writes it; the C library's writes large blocks
    past the caches. The faster of them is the measure.
    """
    elements = bytes_touched // 2 // torch.float32.itemsize
    source = torch.ones(elements, device=settings.device)
    target = torch.zeros_like(source)
    for count in settings.counts:
        yield f"copy_, {count} thr", settings.runner(partial(target.copy_, source), count)
        if source.is_cpu:
            with ThreadPoolExecutor(count) as pool:
                call = moved(target, source, pool, count)
                yield f"memmove, {count} thr", settings.runner(call, count)


def moved(
    target: Tensor, source: Tensor, pool: ThreadPoolExecutor, count: int
) -> Callable[[], object]:
    """A call that moves the source to the target, in as many parts as there are threads."""
    size = source.nbytes // count
    to = [target.data_ptr() + part * size for part in range(count)]
    of = [source.data_ptr() + part * size for part in range(count)]
    return lambda: list(pool.map(memmove, to, of, [size] * count))


def passes(bytes_touched: int, settings: Settings) -> Iterator[tuple[str, Runner]]:
    """Negations in place of so much memory: all of it is read and written, as a step does it.

    A copy's target is mostly read besides, which nobody counts, so a step can pass a copy; hardly
    one of these.
    """
    memory = torch.ones(bytes_touched // torch.float32.itemsize, device=settings.device)
    for count in settings.counts:
        yield f"neg_, {count} thr", settings.runner(memory.neg_, count)
