"""Run a function in several processes that form a group (gloo, on this machine alone)."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import isolated

TIMEOUT = datetime.timedelta(seconds=60)


def run(function: Any, folder: Path, *arguments: Any, world: int = 2, timeout: float = 100) -> str:
    """Call ``function(*arguments)``, of a module of the tests, in each process; return the output.

    The group is there before the call and gone after it. Each process has one thread, so that sums
    of gradients are the same every time, and sees no GPU, to which torch would move what it shards.

    Raises:
        AssertionError: A process failed or hung.
    """
    code = f"""
    import sys, workers
    workers.start({function.__module__!r}, {function.__name__!r}, {str(folder / "store")!r},
                  {arguments!r}, {world})
    """
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return isolated.run(code, timeout=timeout, env=env)


def start(module: str, name: str, store: str, arguments: Any, world: int) -> None:
    """Fork the processes and wait for them."""
    __import__(module)  # once, before there are several
    from torch import multiprocessing

    multiprocessing.start_processes(
        _work, (module, name, store, arguments, world), nprocs=world, start_method="fork"
    )


def _work(rank: int, module: str, name: str, store: str, arguments: Any, world: int) -> None:
    import torch
    import torch.distributed as dist
    from oracle import exact_roots

    from fastsgd import _C

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        with exact_roots():
            getattr(sys.modules[module], name)(*arguments)
    finally:
        dist.destroy_process_group()
        if hasattr(_C, "write_coverage"):  # forked processes end at once
            _C.write_coverage()
