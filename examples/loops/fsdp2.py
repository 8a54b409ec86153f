"""``fully_shard`` (FSDP2): each process has a shard of every parameter, and steps it.

    torchrun --standalone --nproc-per-node 2 examples/loops/fsdp2.py

    fully_shard(model)
    optimizer = fastsgd.SGD(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0)

The optimizer is made after the model is sharded, as with torch's. Parameters and states are
``DTensor``s; the kernels step the shards that are here, and dispatch no operator. ``max_grad_norm``
is the norm over all shards, for which each process sends one number over the mesh; a step that
``skip_nonfinite`` leaves out is left out by all. (The older ``FullyShardedDataParallel`` makes
ordinary tensors of the shards: there clip by its own ``model.clip_grad_norm_``.)

Losses and weights are compared with ``torch.optim.SGD``'s bit by bit, and the norm with torch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from digits import batches, check, network, say
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import fastsgd

STEPS = 60


def sharded() -> nn.Module:
    """Return the network, each layer of it sharded over the processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(
    optimizer_class: type[torch.optim.SGD], clip: bool = False, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Train on this process's share of each batch; return losses and the shards here."""
    model = sharded()
    optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, **options)
    losses = []
    for images, labels in batches(STEPS, size=64):
        share = slice(dist.get_rank(), None, dist.get_world_size())
        loss = cross_entropy(model(images[share]), labels[share])
        optimizer.zero_grad()
        loss.backward()
        if clip:
            fastsgd.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    if options:
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        check("the norm", [optimizer.grad_norm], [norm.full_tensor()], within=1e-5)
    return losses, [p.to_local() for p in model.parameters()]


def main() -> None:
    """Train in each way with both, and compare."""
    for what, clip, options in (("", False, {}), (", clipped", True, {"max_grad_norm": 1.0})):
        (ours, shards), (stock, stock_shards) = (
            train(fastsgd.SGD, **options),
            train(torch.optim.SGD, clip),
        )
        say(f"loss {ours[0]:.3f} at first, {ours[-1]:.3f} after {STEPS} steps")
        check(f"losses{what}", ours, stock)
        check(f"shards{what}", shards, stock_shards)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
