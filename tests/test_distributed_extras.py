"""Several processes: the norm of shards is that of the whole, and averages are sharded alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from oracle import assert_equal

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

import torch.distributed as dist
from test_distributed import backward, each_row, local, network, sharded_network
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

import fastsgd
from fastsgd import _C
from fastsgd._exchange import Exchange

DECAY = 0.75
CPU = torch.device("cpu")


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a distributed tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def true_norm(params: list[Tensor], norm_type: float) -> float:
    """Return the norm of whole gradients, in float64."""
    grads = [full(p.grad).double().flatten() for p in params if p.grad is not None]
    return torch.linalg.vector_norm(torch.cat(grads), norm_type).item()


def values(params: list[Parameter]) -> list[Tensor]:
    """Return copies of what is here of parameters."""
    return [local(p).detach().clone() for p in params]


def train_shards(order: str, skips: bool) -> None:
    """Worker: FSDP2, with shards that are uneven and empty."""
    norm_type = float(order)
    with each_row() as rows:
        for row in rows:
            net = sharded_network()
            params = list(net.parameters())
            extras = {"max_grad_norm": 0.5, "norm_type": norm_type, "skip_nonfinite": skips}
            ours = row.ours(params, ema_decay=DECAY, clear_grads="zero", **extras, **row.rich)
            shards = [Parameter(local(p).detach().clone()) for p in params]
            stock = row.stock(shards, foreach=False, **row.rich)
            averages: list[Tensor] = []
            for step in range(4):
                backward(net, step)
                before = values(params)
                overflows = skips and step == 2
                if overflows and dist.get_rank() == 1:  # in one process alone
                    local(params[0].grad).fill_(math.inf)
                for p, shard in zip(params, shards, strict=True):
                    shard.grad = local(p.grad).clone()
                norm = true_norm(params, norm_type)
                ours.step()
                assert not any(local(p.grad).any() for p in params)
                if overflows:
                    assert ours.skipped_steps == 1
                    assert_equal(values(params), before)
                    continue
                told = ours.grad_norm
                assert told.dtype == torch.float32 and not isinstance(told, DTensor)
                assert abs(told.item() - norm) <= 3e-7 * norm, (told.item(), norm)
                factor = min(1.0, (0.5 / (told + 1e-6)).item())
                for shard in shards:
                    shard.grad.mul_(factor)
                stock.step()
                assert_equal(values(params), values(shards))
                pairs = zip(averages or values(shards), values(shards), strict=True)
                averages = [torch.lerp(average, p, 1 - DECAY) for average, p in pairs]
                kept = [ours.state[p]["ema"] for p in params]
                assert all(isinstance(k, DTensor) for k in kept)
                assert_equal([local(k) for k in kept], averages)
            with ours.ema_weights():
                assert_equal(values(params), averages)
            assert_equal(values(params), values(shards))
            exchange = Exchange(params, kept)
            exchange.make()
            assert exchange.left == [[]], "the kernels exchange all"
            exchange.undo()
            assert_equal(values(params), values(shards))
            freed = next(local(k) for k in kept if local(k).numel() > 0)
            freed.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="0 bytes, too few"), ours.ema_weights():
                pass


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_shards(tmp_path: Path, norm_type: float, skips: bool) -> None:
    """FSDP2: the norm of all shards clips each, and is told in each process."""
    workers.run(train_shards, tmp_path, str(norm_type), skips)


def beyond_squares() -> None:
    """Worker: gradients whose squares float64 does not hold."""
    mesh = init_device_mesh("cpu", (2,))
    for size in (1e200, 1.3e154, 1e-200):
        p = Parameter(distribute_tensor(torch.zeros(4, dtype=torch.float64), mesh, [Shard(0)]))
        grad = torch.full((4,), size, dtype=torch.float64)
        p.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer = fastsgd.SGD([p], lr=1.0, skip_nonfinite=True)
        optimizer.step()
        assert optimizer.skipped_steps == 0
        torch.testing.assert_close(optimizer.grad_norm.item() / size, 2.0, rtol=3e-14, atol=0)


def test_beyond_squares(tmp_path: Path) -> None:
    """They have a norm, and are finite."""
    workers.run(beyond_squares, tmp_path)


def wide_averages() -> None:
    """Worker: averages in float32 of shards in bfloat16, and of plain parameters beside them."""
    mesh = init_device_mesh("cpu", (2,))
    with each_row() as rows:
        for row in rows:
            torch.manual_seed(5)
            begins, grads = (torch.randn(2, 8, 5).bfloat16() for _ in range(2))
            sides = []
            for place in (lambda t: distribute_tensor(t, mesh, [Shard(0)]), torch.clone):
                params = [Parameter(place(t)) for t in begins]
                options = {**row.rich, "ema_decay": DECAY, "ema_dtype": torch.float32}
                optimizer = row.ours(params, **options)
                for _ in range(3):
                    for p, grad in zip(params, grads, strict=True):
                        p.grad = place(grad)
                    assert _C.step(optimizer)  # in the kernels, all of it
                sides.append([[full(p.detach()), full(optimizer.state[p]["ema"])] for p in params])
            assert_equal(*sides)


def test_wide_averages(tmp_path: Path) -> None:
    """They are stepped as plain parameters are."""
    workers.run(wide_averages, tmp_path)


def clip_placements() -> None:
    """Worker: gradients that are sharded, replicated and partial sums."""
    from fastsgd import clip_grad_norm_

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    whole = torch.randn(9, 5)
    placed: list[Any] = [Shard(0), Shard(1), Replicate()]
    for norm_type in (2.0, math.inf):
        params = [Parameter(distribute_tensor(torch.zeros(9, 5), mesh, [p])) for p in placed]
        for p, placement in zip(params, placed, strict=True):
            p.grad = distribute_tensor(whole.clone(), mesh, [placement])
        params.append(Parameter(distribute_tensor(torch.zeros(9, 5), mesh, [Replicate()])))
        params[-1].grad = DTensor.from_local(
            whole * (0.25 + 0.5 * dist.get_rank()), mesh, [Partial()]
        )
        norm = true_norm(params, norm_type)
        told = clip_grad_norm_(params, norm / 2, norm_type)
        assert abs(told.item() - norm) <= 3e-7 * norm
        for p in params:
            torch.testing.assert_close(full(p.grad), whole / 2)


def shards_of_shards() -> None:
    """Worker: as FSDP2 over tensor parallelism has them."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(4)
    whole = torch.randn(8, 5)
    placements = [_StridedShard(0, split_factor=2)]
    here = whole.view(2, 2, 2, 5)[:, dist.get_rank()].reshape(4, 5)
    p = Parameter(DTensor.from_local(torch.zeros(4, 5), mesh, placements))
    p.grad = DTensor.from_local(here.clone(), mesh, placements)
    for norm_type in (2.0, math.inf):
        norm = torch.linalg.vector_norm(whole.double().flatten(), norm_type).item()
        told = fastsgd.clip_grad_norm_([p], 1e9, norm_type)
        assert abs(told.item() - norm) <= 3e-7 * norm
        optimizer = fastsgd.SGD([p], lr=0.0, max_grad_norm=1.0, norm_type=norm_type)
        optimizer.step()
        assert_equal(optimizer.grad_norm, told)


def test_shards_of_shards(tmp_path: Path) -> None:
    """Each process has the norm of the whole."""
    workers.run(shards_of_shards, tmp_path)


def find_nan(order: str) -> None:
    """Worker: a NaN in the shard of one process."""
    mesh = init_device_mesh("cpu", (2,))
    for rank in range(2):
        p = Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        grad = torch.ones(4)
        grad[2 * rank] = math.nan
        p.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer = fastsgd.SGD([p], lr=1.0, skip_nonfinite=True, norm_type=float(order))
        optimizer.step()
        assert optimizer.skipped_steps == 1 and optimizer.grad_norm.isnan()
        assert not local(p).any()
        with pytest.raises(RuntimeError, match="non-finite"):
            fastsgd.clip_grad_norm_([p], 1.0, float(order), error_if_nonfinite=True)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_nan_in_one_process(tmp_path: Path, norm_type: float) -> None:
    """All skip the step, whichever has it."""
    workers.run(find_nan, tmp_path, str(norm_type))


def skip_apart() -> None:
    """Worker: a NaN in a plain gradient beside shards, which the other process has not."""
    mesh = init_device_mesh("cpu", (2,))
    whole = Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    plain = Parameter(torch.zeros(3))
    optimizer = fastsgd.SGD([whole, plain], lr=1.0, skip_nonfinite=True)
    for step in range(3):
        whole.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        plain.grad = torch.ones(3)
        if step == 1 and dist.get_rank() == 0:
            plain.grad[1] = math.nan
        optimizer.step()
    assert optimizer.skipped_steps == (dist.get_rank() == 0)


def test_norms_that_differ(tmp_path: Path) -> None:
    """Plain gradients are each process's own, and so are the norms: nobody waits for another."""
    workers.run(skip_apart, tmp_path)


def test_placements(tmp_path: Path) -> None:
    """``clip_grad_norm_`` counts each element of a distributed gradient once."""
    workers.run(clip_placements, tmp_path)


def refuse_parts() -> None:
    """Worker: FSDP1, whose flat parameters have no norm here that is the model's."""
    for views in (False, True):
        net = FullyShardedDataParallel(network(), use_orig_params=views, device_id=CPU)
        for name, value in (("max_grad_norm", 0.0), ("skip_nonfinite", True)):
            with pytest.raises(ValueError, match=f"{name} cannot be had with FullySharded"):
                fastsgd.SGD(net.parameters(), lr=0.1, **{name: value})
        optimizer = fastsgd.SGD(net.parameters(), lr=0.1, ema_decay=DECAY, skip_nonfinite=False)
        backward(net, 0)
        optimizer.step()
        with pytest.raises(ValueError, match="error_if_nonfinite cannot be had"):
            optimizer.error_if_nonfinite = True
        assert optimizer.error_if_nonfinite is False
        whole = fastsgd.SGD([Parameter(torch.ones(3))], lr=0.1, max_grad_norm=1.0)
        with pytest.raises(ValueError, match="max_grad_norm cannot be had"):
            whole.add_param_group({"params": list(net.parameters())})
        assert len(whole.param_groups) == 1


def test_parts(tmp_path: Path) -> None:
    workers.run(refuse_parts, tmp_path)
