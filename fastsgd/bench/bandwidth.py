"""How fast memory can be copied here: what a large step is measured by."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import memmove
from functools import partial

import torch
from torch import Tensor

from fastsgd.bench.measure import Runner


def copies(bytes_touched: int, counts: Iterable[int]) -> Iterator[tuple[str, Runner]]:
    """Copies within so much memory, half of it read and half of it written.

    torch's reads each line of the target before it writes it; the C library's writes large blocks
    past the caches. The faster of them is the measure.
    """
    source = torch.ones(bytes_touched // 2 // torch.float32.itemsize)
    target = torch.zeros_like(source)
    for count in counts:
        yield f"copy_, {count} thr", Runner(partial(target.copy_, source), count)
        with ThreadPoolExecutor(count) as pool:
            yield f"memmove, {count} thr", Runner(moved(target, source, pool, count), count)


def moved(
    target: Tensor, source: Tensor, pool: ThreadPoolExecutor, count: int
) -> Callable[[], object]:
    """A call that moves the source to the target, in as many parts as there are threads."""
    size = source.nbytes // count
    to = [target.data_ptr() + part * size for part in range(count)]
    of = [source.data_ptr() + part * size for part in range(count)]
    return lambda: list(pool.map(memmove, to, of, [size] * count))
