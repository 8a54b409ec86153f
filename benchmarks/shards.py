"""What a step costs where parameters are sharded by ``fully_shard``, over plain tensors.

Two processes, 500 parameters. Each process steps its shards, and plain tensors of the shards' size
with the same values, in turn; printed are the medians of the ratios in process 0.

    python benchmarks/shards.py
"""

import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastsgd

WORLD = 2
PARAMETERS = 500
PAIRS = 60
REPEATS = 20
LR = 1e-9  # leaves the values where they are


class Model(nn.Module):
    """As many parameters as are asked for, each in the loss."""

    def __init__(self, size: int) -> None:
        """Make them, ``size`` elements a process."""
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WORLD, size) for _ in range(PARAMETERS))

    def forward(self) -> torch.Tensor:
        """Sum all squares."""
        return torch.stack([w.square().sum() for w in self.weights]).sum()


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """How long some steps take."""
    start = time.perf_counter()
    for _ in range(REPEATS):
        optimizer.step()
    return time.perf_counter() - start


def race(cls: type[torch.optim.Optimizer], size: int) -> list[float]:
    """Ratios of a step of shards to one of plain tensors."""
    model = fully_shard(Model(size), mesh=init_device_mesh("cpu", (WORLD,)))
    model().backward()
    plain = []
    for p in model.parameters():
        plain.append(nn.Parameter(p.detach().to_local().clone()))
        plain[-1].grad = p.grad.to_local().clone()
    sharded, whole = cls(model.parameters(), lr=LR), cls(plain, lr=LR)
    for optimizer in (sharded, whole):
        seconds(optimizer)
    for p, q in zip(model.parameters(), plain, strict=True):
        assert torch.equal(p.detach().to_local(), q.detach())
    return [seconds(sharded) / seconds(whole) for _ in range(PAIRS)]


def work(rank: int, store: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for cls in (fastsgd.SGD, fastsgd.AdamW):
        for size in (16, 1024, 4096):
            low, middle, high = statistics.quantiles(race(cls, size))
            if rank == 0:
                print(f"{cls.__name__:8}{size:6} elements  {middle:.2f}  ({low:.2f} .. {high:.2f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (os.path.join(folder, "store"),), WORLD)
